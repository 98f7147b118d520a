"""lm-evaluation-harness end to end, offline, on own tasks: equal to its own model with a full cache, to ours under eviction.

Run by `make test-harness`, in an environment of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.models import examples, saved_text, words

pytestmark = pytest.mark.harness
ROOT = Path(__file__).parents[2]
MARK = "|||"
TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}" + MARK + "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "num_fewshot": 1,
        "fewshot_split": "train",
    },
    "own_rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}}"},
    "own_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}" + MARK + "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8},
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Own tasks as files: YAML for the harness, JSON lines for its data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "context": e.segments[0].payload,
            "question": e.turns[0].question,
            "answer": "red",
            "choices": ["red", "a blue one", "x"],
            "label": 0,
        }
        for e in examples(4)
    ]
    for split, part in (("train", rows[3:]), ("test", rows[:3])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    for name, told in TASKS.items():
        data = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps(data | told))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def evaluate(tasks):
    """Results of a model on the own tasks, without the harness's index of its own thousands."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def run(lm, names=tuple(TASKS), **more):
        return simple_evaluate(lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, **more)

    return run


@pytest.fixture(scope="module")
def reference():
    """The harness's own model, whose prompts have no marker."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(saved_text()), device="cpu", dtype="float32", batch_size=2, max_length=500)


def ours(**told):
    from retention.harness.lm_eval import RetentionLM

    base = {"device": "cpu", "policy": "full", "batch_size": 2, "max_length": 500, "context_end": MARK}
    return RetentionLM(str(saved_text()), **base | told)


def unmarked(requests):
    from copy import copy

    found = []
    for request in requests:
        plain = copy(request)
        plain.arguments = (request.args[0].replace(MARK, ""), *request.args[1:])
        found.append(plain)
    return found


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, own, 0, ("own", number, 1)) for number, own in enumerate(arguments)]


@pytest.mark.parametrize("told", [{}, {"prefill_chunk": 16}, {"policy": "snapkv", "budget": 512}], ids=str)
def test_a_full_cache_is_the_harness_s_own_model(reference, told):
    model = ours(**told)
    contexts = [words(n, seed=n) + MARK + words(3, seed=n) for n in (4, 30, 9)] + [words(6), "ends in a space ", ""]
    pairs = requests("loglikelihood", *[(c, more) for c in contexts for more in (" red", " a longer one", "x")])
    told, own = reference.loglikelihood(unmarked(pairs)), model.loglikelihood(pairs)
    assert [a for a, _ in own] == pytest.approx([a for a, _ in told], abs=1e-4)
    assert [b for _, b in own] == [b for _, b in told]
    texts = requests("loglikelihood_rolling", *[(words(n, seed=n),) for n in (2, 40, 130)])  # the last is two windows
    assert model.loglikelihood_rolling(texts) == pytest.approx(reference.loglikelihood_rolling(texts), rel=1e-6)
    stop = ["h", "x", "y", "\n"]  # in the name of no special token, which the harness's own model would stop at
    asked = [(c or "red", {"until": stop, "max_gen_toks": 12}) for c in contexts]
    asked += [(contexts[0], {"until": [], "max_gen_toks": 5, "do_sample": False})]
    written = requests("generate_until", *asked)
    assert model.generate_until(written) == reference.generate_until(unmarked(written))


def test_prompts_too_long_lose_what_the_harness_takes(reference):
    from lm_eval.models.huggingface import HFLM

    short = HFLM(pretrained=str(saved_text()), device="cpu", dtype="float32", max_length=60)
    model = ours(max_length=60)
    pairs = requests("loglikelihood", *[(words(30) + MARK + "yes", more) for more in (" red", " a longer one")])
    told = short.loglikelihood(unmarked(pairs))
    assert [a for a, _ in model.loglikelihood(pairs)] == pytest.approx([a for a, _ in told], abs=1e-4)
    written = requests("generate_until", (words(30), {"until": [], "max_gen_toks": 10}))
    assert model.generate_until(written) == short.generate_until(written)
    assert all(row["cut"] for row in model.records.rows)


def test_results_say_what_was_evicted(evaluate):
    """Whole tasks: few-shot prompts, chat templates, and what results say of themselves."""
    model = ours(policy="snapkv", budget=8, **{"policy.window_size": 4})
    found = evaluate(model)
    told = found["config"]["retention"]
    assert told["policy"] == "snapkv"
    assert told["policy_settings"]["window_size"] == 4
    assert told["budget"] == {"requested": "8", "resolved": [8, 8]}
    assert told["protocol"]["question"] == {"agnostic": 12}  # three contexts of three choices, three of one answer
    assert told["kept_share"] < 0.2
    heads = 3 * 2
    assert {row["kept"] for row in model.records.rows if row["kind"] != "loglikelihood_rolling"} == {8 * heads}
    chosen = [row for row in model.records.rows if row["task"] == "own_choice"]
    assert [(row["doc_id"], row["number"]) for row in chosen] == [(d, c) for d in range(3) for c in range(3)]
    assert {s["doc_id"] for s in found["samples"]["own_choice"]} == {row["doc_id"] for row in chosen}
    aware = ours(policy="snapkv", budget=8, context_end=None)
    told = evaluate(aware, ["own_answer"], apply_chat_template=True)["config"]["retention"]
    assert told["protocol"]["question"] == {"aware": 3}


def test_predictions_are_the_native_runners(evaluate):
    from retention import Budget, CacheConfig
    from retention.data.render import Renderer
    from retention.evaluation.arms import Arm
    from retention.evaluation.protocol import Protocol
    from retention.evaluation.runner import Runner

    model = ours(policy="snapkv", budget=8)
    found = evaluate(model, ["own_answer"])["samples"]["own_answer"]
    renderer = Renderer(model.loaded.processor, [])
    arm = Arm("snapkv", model.loaded.policy, CacheConfig(Budget(8)), "8", Protocol(), False)
    runner = Runner(model.loaded.model, renderer, "natural")
    rows = [row for *_, rows in runner.run(renderer.render(examples()), [arm], None) for row in rows]
    assert [s["resps"][0][0].strip() for s in found] == [row["prediction"] for row in rows]
    assert [row["kept"] for row in model.records.rows] == [row["kept"] for row in rows]


def test_repeated_samples_differ_and_repeat(evaluate):
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    written = requests("generate_until", *[(words(9), drawn)] * 3)
    first, again = ours().generate_until(written), ours(batch_size=1).generate_until(written)
    assert first == again
    assert len(set(first)) == 3


def test_the_command_runs_all_kinds_of_tasks(tasks, tmp_path):
    told = (
        f"pretrained={saved_text()},policy=knorm,budget=25%,context_end={MARK},device=cpu,records={tmp_path / 'rows'}"
    )
    line = ["--model", "retention", "--model_args", told, "--tasks", ",".join(TASKS), "--include_path", str(tasks)]
    line += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "2"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-m", "retention.harness.lm_eval", *line], cwd=ROOT, env=offline, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in TASKS)
    written = next((tmp_path / "out").rglob("results_*.json"))
    results = json.loads(written.read_text())
    assert results["config"]["retention"]["budget"]["requested"] == "25%"
    assert results["results"]["own_rolling"]["word_perplexity,none"] > 1
    assert json.loads((tmp_path / "rows" / "manifest.json").read_text())["requests"] == 3 * 3 + 3 + 3
