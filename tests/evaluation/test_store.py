"""Rows on disk: a stopped run goes on with whole contexts, several processes write beside each other."""

import json

from retention.evaluation.store import RowStore


def row(example, turn=0, *, policy="full", turns=2, score=1.0):
    told = {"task": "t", "policy": policy, "protocol": "p", "budget": {"requested": "5%"}, "seed_train": None}
    return told | {"example_id": example, "turn": turn, "n_turns": turns, "score": score}


def context(example, **more):
    return [row(example, turn, **more) for turn in range(2)]


KEY = ("t", "full", "p", "5%", None)


def test_what_was_cut_off_is_done_again(tmp_path):
    store = RowStore(tmp_path)
    store.add(context("a"))
    store.add(context("b"))
    file = tmp_path / "examples.jsonl"
    file.write_text(file.read_text()[:-5])  # killed within the last line
    again = RowStore(tmp_path)
    assert again.has(KEY, ["a"])
    assert not again.has(KEY, ["b"])
    assert again.reused == 2
    assert [json.loads(line)["example_id"] for line in file.read_text().splitlines()] == ["a", "a"]


def test_processes_write_their_own_files_and_the_first_gathers(tmp_path):
    first, second = RowStore(tmp_path, 0), RowStore(tmp_path, 1)
    first.add(context("a"))
    second.add(context("b"))
    second.file.write_text(second.file.read_text() + json.dumps(row("c"))[:20])  # the second was killed
    resumed = RowStore(tmp_path, 1)
    assert resumed.has(KEY, ["a", "b"])
    resumed.add(context("c"))
    first.gather()
    assert [r["example_id"] for r in first.rows] == ["a", "a", "b", "b", "c", "c"]
    assert not (tmp_path / "examples.1.jsonl").exists()
    assert RowStore(tmp_path).rows == first.rows


def test_rows_that_two_files_hold_count_once(tmp_path):
    """The first process was killed between writing the whole and removing the parts."""
    RowStore(tmp_path, 0).add(context("a") + context("b"))
    (tmp_path / "examples.1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in context("b")))
    store = RowStore(tmp_path)
    assert len(store.rows) == 4
    store.gather()
    assert len(RowStore(tmp_path).rows) == 4
