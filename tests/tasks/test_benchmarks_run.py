"""Published data sets through a whole evaluation of tiny models: a text, an image, a video, several turns, long answers."""

import json
from functools import lru_cache

import pytest
import torch

from retention.config import compose
from retention.evaluation.run import run
from tests import hub, zoo
from tests.tasks.fixtures import images, task_of, texts

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("unrendered")
POLICIES = ("keydiff", "streaming_llm", "random")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@lru_cache
def text_model():
    """A tiny text model that knows every byte, in the hub's layout."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = zoo.saved("qwen2_vl").parent / "text_bytes"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**hub.TEXT)).save_pretrained(folder)
    hub.tokenizer({}).save_pretrained(folder)
    return folder


def evaluated(name, model, folder, *, number=0, more=(), **changes):
    """Rows and summary of the fixture of a benchmark under the full cache and three policies."""
    task = task_of(name, {**texts.FIXTURES, **images.FIXTURES}[name][number], folder / "data", **changes)
    asked = {key: value for key, value in vars(task).items() if key not in ("rows", "judge") and value is not None}
    settings = [f"task.{name}.{key}={json.dumps(value)}" for key, value in asked.items()]
    overrides = [
        f"tasks=[{name}]", f"model.name={zoo.saved(model) if model else text_model()}", "model=hf", "gates=null", f"policies=[{','.join(POLICIES)}]",
        "budgets=[25%]", "examples=64", "batch_size=4", f"output_dir={folder / 'run'}", *settings, *more,
    ]  # fmt: skip
    result = run(compose("eval", overrides))
    rows = [json.loads(line) for line in (folder / "run" / "examples.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "run" / "summary.json").read_text()), result


CASES = [
    (
        "longbench_v2",
        None,
        {"chain_of_thought": True, "most_thought": 3, "most_new_tokens": 4, "max_tokens": 400},
        2,
        2,
    ),
    ("docvqa", "qwen2_vl", {"most_new_tokens": 4}, 1, 1),
    ("video_mme", "qwen2_vl", {"frames": 2, "most_new_tokens": 4}, 4, 1),
    ("mm_niah", "qwen2_vl", {"most_new_tokens": 4}, 2, 1),
]


@pytest.mark.parametrize(("name", "model", "changes", "contexts", "turns"), CASES)
def test_every_row_is_answered_under_every_policy(name, model, changes, contexts, turns, tmp_path):
    rows, summary, result = evaluated(name, model, tmp_path, **changes)
    assert {row["policy"] for row in rows} == {"full", *POLICIES}
    assert len(rows) == 4 * contexts * turns
    for row in rows:
        assert row["error"] is None
        assert 0 <= row["score"] <= 1
        assert row["generated"] in range(1, 5)
        assert row["task"] == name
        if row["policy"] != "full":
            assert row["kept"] < 0.4 * row["entries_full"]
    assert len(summary["rows"]) == 4
    assert name in result.table
    if name == "longbench_v2":
        assert {(row["turn"], row["scored"], row["generated"] <= 3) for row in rows} >= {(0, False, True)}
        assert {row["turn"] for row in rows if row["scored"]} == {1}
        assert {row["n"] for row in summary["rows"]} == {2}
        strata = {(row["by"], row["group"]): row["n_contexts"] for row in summary["groups"]}
        assert strata["difficulty x length", "easy x short"] == 2
    if name == "video_mme":
        assert {row["cluster"] for row in rows} == {"abc", "xyz"}
        assert {(row["n_contexts"], row["n_clusters"]) for row in summary["rows"]} == {(4, 2)}
        short = [row for row in summary["groups"] if (row["by"], row["group"]) == ("duration", "short")]
        assert {(row["policy"], row["n_contexts"]) for row in short} == {(name, 4) for name in ("full", *POLICIES)}


def test_turns_make_one_dialogue_or_are_asked_of_the_same_cache(tmp_path):
    rows, _, _ = evaluated("scbench", None, tmp_path / "a", most_new_tokens=3)
    assert {row["turn"]: row["query_position"] for row in rows} == {0: "after", 1: "deferred_turn", 2: "deferred_turn"}
    rows, _, _ = evaluated("scbench", None, tmp_path / "b", number=1, most_new_tokens=3)
    assert {row["turn"]: row["query_position"] for row in rows} == {0: "after", 1: "after"}
    assert {type(row["readable"]) for row in rows} == {bool}


def test_a_budget_for_the_solution_needs_something_that_evicts(tmp_path):
    with pytest.raises(ValueError, match=r"about decoding under a budget and cache.evict_every is null"):
        evaluated("gsm8k", None, tmp_path / "a", max_new_tokens=8)
    more = ("cache.evict_every=4", "budgets=[16]")
    rows, _, _ = evaluated("gsm8k", None, tmp_path / "b", more=more, max_new_tokens=24)
    assert all(row["cut_off"] == (row["generated"] == 24) for row in rows)


def test_rows_without_a_judge_are_marked_to_the_table(tmp_path):
    rows, summary, _ = evaluated("longmemeval", None, tmp_path, more=("batch_size=1",), limit=1, most_new_tokens=3)
    assert {row["comparable"] for row in rows} == {False}
    assert {row["comparable"] for row in summary["rows"]} == {False}
    assert "not comparable with published numbers" in (tmp_path / "run" / "table.md").read_text()
    recall = {row["policy"]: row["evidence_recall"]["mean"] for row in rows}
    assert recall["full"] == 1.0
    assert recall["streaming_llm"] is not None
