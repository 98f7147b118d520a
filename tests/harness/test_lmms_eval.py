"""lmms-eval end to end, offline, on own image tasks over the embedded model: the native runner's predictions.

Run by `make test-harness`, in an environment of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.harness
ROOT = Path(__file__).parents[2]
MARK, COUNT = "|||", 6
CODE = f"""
from PIL import Image

MARK = {MARK!r}


def turn(doc, number):
    return {{"role": "user", "content": [{{"type": "text", "text": doc["questions"][number]}}]}}


def messages(doc, **kwargs):
    shown = [{{"type": "image", "url": Image.open(p["payload"])}} if p["kind"] == "image" else {{"type": "text", "text": p["payload"]}} for p in doc["parts"]]
    return [{{"role": "user", "content": [*shown, {{"type": "text", "text": MARK + doc["questions"][0]}}]}}]


def rounds(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return messages(doc)
    if round_idx == len(doc["questions"]):
        return None, True, previous_output, None
    return [turn(doc, round_idx)], False, previous_output, None


def right(doc, results):
    return {{"right": float(results[0].strip() == doc["answers"][0])}}


def all_right(doc, results):
    said = results[0]
    return {{"right": sum(a == b.strip() for a, b in zip(doc["answers"], said)) / len(said)}}


def mean(items):
    return sum(items) / len(items)
"""
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_messages: !function own.{messages}
doc_to_text: "{{{{questions}}}}"
doc_to_visual: !function own.messages
doc_to_target: "{{{{answers}}}}"
process_results: !function own.{results}
generation_kwargs:
  max_new_tokens: 1
  until: []
metric_list:
  - metric: right
    aggregation: !function own.mean
    higher_is_better: true
"""


def examples():
    from retention.tasks import TASKS

    return [TASKS["needles"]().example(0, "test", i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Own tasks as files: YAML, the functions it names, pictures, JSON lines."""
    from PIL import Image

    folder, rows = tmp_path_factory.mktemp("tasks"), []
    for example in examples():
        parts = []
        for number, segment in enumerate(example.segments):
            file = folder / f"{example.id.replace('/', '_')}-{number}.png"
            if segment.kind == "image":
                Image.fromarray(np.asarray(segment.payload)).save(file)
            parts.append({"kind": segment.kind, "payload": str(file) if segment.kind == "image" else segment.payload})
        turns = example.turns
        rows.append({"parts": parts, "questions": [t.question for t in turns], "answers": [t.reference for t in turns]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(CODE)
    kinds = {"own_image": ("generate_until", "messages", "right"), "own_rounds": ("generate_until_multi_round", "rounds", "all_right")}  # fmt: skip
    for name, (kind, messages, results) in kinds.items():
        told = {"name": name, "data": folder / "data.jsonl", "kind": kind, "messages": messages, "results": results}
        (folder / f"{name}.yaml").write_text(YAML.format(**told))
    return folder


@pytest.fixture(scope="module")
def native():
    """Predictions, kept entries and scores of the native runner, by row of context and turn."""
    from retention.data.render import Renderer
    from retention.evaluation.arms import Arm
    from retention.evaluation.protocol import Protocol
    from retention.evaluation.runner import Runner
    from retention.harness.settings import read_arguments
    from retention.models import family_of

    loaded = read_arguments({"pretrained": "embedded", "device": "cpu", "policy": "keydiff", "budget": "10%"})[1]
    renderer = Renderer(loaded.processor, family_of(loaded.model).visual_ids(loaded.model.config))
    arm = Arm("keydiff", loaded.policy, loaded.cache, "10%", Protocol(), False)
    runner = Runner(loaded.model, renderer, "symbolic")
    return [row for *_, rows in runner.run(renderer.render(examples()), [arm], None) for row in rows]


def run(tasks, tmp_path, name, **told):
    """The harness's command in a process of its own: its results, its samples, our manifest and rows."""
    base = {"pretrained": "embedded", "policy": "keydiff", "budget": "10%", "context_end": MARK, "records": tmp_path / "rows"}  # fmt: skip
    line = ["--model", "retention", "--model_args", ",".join(f"{k}={v}" for k, v in (base | told).items())]
    line += ["--tasks", name, "--include_path", str(tasks), "--batch_size", "4", "--log_samples", "--device", "cpu"]
    line += ["--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tasks)}  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "lmms_eval", *line], cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    samples = [json.loads(x) for x in next((tmp_path / "out").rglob("*_samples_*.jsonl")).read_text().splitlines()]
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "rows" / "requests.jsonl").read_text().splitlines()]
    return results["results"][name], sorted(samples, key=lambda s: s["doc_id"]), manifest, rows


def test_answers_are_the_native_runners(tasks, native, tmp_path):
    found, samples, manifest, rows = run(tasks, tmp_path, "own_image")
    first = [row for row in native if row["turn"] == 0]
    assert [s["filtered_resps"][0].strip() for s in samples] == [row["prediction"] for row in first]
    assert found["right,none"] == pytest.approx(np.mean([row["score"] for row in first]))
    assert [row["kept"] for row in rows] == [row["kept"] for row in first]
    assert [row["doc_id"] for row in rows] == list(range(COUNT))
    assert manifest["protocol"]["question"] == {"agnostic": COUNT}
    assert manifest["budget"]["requested"] == "10%"
    assert manifest["kept_share"] == pytest.approx(0.1, abs=0.01)


def test_dialogues_are_the_native_runners(tasks, native, tmp_path):
    found, _, manifest, rows = run(tasks, tmp_path, "own_rounds", dialogue="True")
    assert found["right,none"] == pytest.approx(np.mean([row["score"] for row in native]))
    assert manifest["protocol"]["turns"] == "multi"
    assert len(rows) == COUNT


def test_rounds_are_prompts_of_their_own_unless_told(tasks, native, tmp_path):
    found, _, manifest, _ = run(tasks, tmp_path, "own_rounds", context_end="none_of_these")
    assert manifest["protocol"] | {"turns": "single"} == manifest["protocol"]
    assert manifest["protocol"]["question"] == {"aware": COUNT}
    assert found["right,none"] < np.mean([row["score"] for row in native])  # later rounds have lost their context
