"""What is read when: mixtures, length buckets, budgets, processes; from any place on as if never interrupted."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from retention.data.batches import Limits, Slot, planned, runs
from retention.data.encode import Encoder, Rules
from retention.data.loader import Maker, MixtureLoader
from retention.data.mixture import STREAMED, Mixture
from retention.data.plan import Plan, Source
from retention.data.source import JsonLines
from tests import hub


def drawn(mixture, epoch):
    return [(int(s), mixture.row(int(s), int(d))) for s, d in mixture.order(epoch)]


def test_without_weights_every_row_comes_once_per_epoch():
    mixture = Mixture([5, 9], [None, None], seed=0)
    every = [(0, i) for i in range(5)] + [(1, i) for i in range(9)]
    epochs = [drawn(mixture, epoch) for epoch in range(3)]
    assert all(sorted(epoch) == every for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert drawn(Mixture([5, 9], [None, None], seed=0), 2) == epochs[2], "it depends on what was asked before"
    assert drawn(Mixture([5, 9], [None, None], seed=1), 0) != epochs[0]


def test_weights_are_kept_in_every_epoch_and_rows_come_equally_often():
    mixture = Mixture([10, 30], [3.0, 1.0], seed=0)
    epochs = [drawn(mixture, epoch) for epoch in range(6)]
    assert all(Counter(s for s, _ in epoch) == {0: 30, 1: 10} for epoch in epochs)
    seen = Counter(place for epoch in epochs for place in epoch)
    assert {seen[0, i] for i in range(10)} == {18}
    assert {seen[1, i] for i in range(30)} == {2}
    rare = Mixture([100, 100], [1e-9, 1.0], seed=0)
    assert (rare.counts, rare.size, len(rare.order(0))) == ([1, 200], 201, 201)


def test_streams_are_read_on_through_the_epochs():
    mixture = Mixture([None, 3], [1.0, 1.0], seed=0)
    assert mixture.size == STREAMED
    for epoch in range(2):
        numbers = [number for source, number in drawn(mixture, epoch) if source == 0]
        assert numbers == list(range(epoch * STREAMED // 2, (epoch + 1) * STREAMED // 2))
    with pytest.raises(ValueError, match="a weight in every source or in none"):
        Mixture([1, 2], [1.0, None], seed=0)


FOUR = Limits(4)
LIMITS = [FOUR, Limits(100, tokens=50), Limits(8, images=3), Limits(3, tokens=40, images=2)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_keep_their_budgets_and_every_row(limits, ranks):
    draw = np.random.default_rng(0)
    slots = [Slot(0, i, int(draw.integers(1, 60)), int(draw.integers(0, 3))) for i in range(37)]
    batches = planned(slots, limits, ranks, np.random.default_rng(1))
    assert sorted(slot.number for batch in batches for slot in batch) == list(range(37))
    assert len(batches) % ranks == 0
    for batch in batches:
        assert len(batch) == 1 or limits.hold([(s.tokens, s.images) for s in batch])
    spread = np.mean([np.ptp([s.tokens for s in batch]) for batch in batches])
    assert spread < 10, "rows of a batch differ in length"


def test_what_cannot_be_dealt_out_is_left():
    slots = [Slot(0, i, 1) for i in range(5)]
    assert len(planned(slots, Limits(4), 4, np.random.default_rng(0))) == 4
    assert len(planned(slots[:3], Limits(4), 4, np.random.default_rng(0))) == 0
    assert runs([], Limits(4)) == []
    assert runs([(9, 0), (1, 0), (1, 0)], Limits(4, tokens=3)) == [slice(0, 1), slice(1, 3)]
    lengths = [(4, 0), (2, 0), (2, 0), (1, 0), (1, 0)]
    assert runs(lengths, Limits(9, tokens=8)) == [slice(0, 2), slice(2, 5)]
    assert runs(lengths, Limits(9, tokens=8, packed=True)) == [slice(0, 3), slice(3, 5)]
    assert runs([(8, 0), (1, 0), (1, 0)], Limits(9, tokens=10, packed=True)) == [slice(0, 2), slice(2, 3)]


def rows(tmp_path, count=40, bad=(), name="x.jsonl", long=1):
    told = [{"prompt": "What is it? " * (1 + i % 7), "response": f"it is {i}" * long} for i in range(count)]
    for i in bad:
        told[i]["response"] = ""
    (tmp_path / name).write_text("\n".join(map(json.dumps, told)))
    return Source(name, JsonLines(tmp_path / name))


class Streamed:
    """A source as a stream that has to be read in order."""

    def __init__(self, inner):
        self.inner, self.opened = inner, 0

    def after(self, number):
        self.opened += 1
        while True:
            yield self.inner[number % len(self.inner)]
            number += 1


def loader(sources, *, limits=FOUR, ranks=1, rank=0, workers=0, steps=10**6, refuse=False, bucket=3, **rules):
    plan = Plan(sources, limits, seed=3, bucket=bucket, image_tokens=16, ranks=ranks)
    tokenizer = hub.tokenizer({})
    maker = Maker(sources, Encoder(tokenizer, [], Rules(**rules)), limits)
    return MixtureLoader(plan, maker, steps=steps, num_workers=workers, refuse=refuse, rank=rank)


def same(one, other):
    return one.ids == other.ids and torch.equal(one.labels, other.labels) and one.inputs.keys() == other.inputs.keys()


CASES = {
    "plain": {},
    "budgets that guesses break": {"limits": Limits(8, tokens=400)},
    "workers": {"workers": 2},
    "workers and budgets": {"workers": 2, "limits": Limits(8, tokens=400)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["rows", "stream", "both"])
def test_a_resumed_loader_gives_the_batches_of_an_uninterrupted_one(case, kind, tmp_path):
    def sources():
        found = [rows(tmp_path, bad=(3, 17, 18)), rows(tmp_path, 25, name="y.jsonl")]
        for i, source in enumerate(found):
            if kind == "stream" or (kind == "both" and i):
                source.rows = Streamed(source.rows)
        return found

    whole = loader(sources(), **CASES[case])
    states, batches = [json.dumps(whole.state_dict())], []
    for batch in islice(whole, 31):
        batches.append(batch)
        states.append(json.dumps(whole.state_dict(), sort_keys=True))
        assert json.loads(states[-1])["ranks"]["0"]["done"] == len(batches)
    for stop in (0, 1, 7, 16, 30):
        again = loader(sources(), **{**CASES[case], "workers": 0 if stop == 7 else CASES[case].get("workers", 0)})
        state = json.loads(states[stop])
        again.load_state_dict({"ranks": {int(k): v for k, v in state["ranks"].items()}})
        rest = list(islice(again, 31 - stop))
        assert len(rest) == 31 - stop
        assert all(same(one, other) for one, other in zip(rest, batches[stop:], strict=True)), stop
        assert json.dumps(again.state_dict(), sort_keys=True) == states[31]


def test_budgets_hold_for_what_rows_really_take(tmp_path):
    """Guessed by characters over 4, tokens of this tokenizer are four times as many."""
    limits = Limits(16, tokens=400)
    read = loader([rows(tmp_path)], limits=limits, bucket=1)
    batches = list(islice(read, 20))
    assert all(len(b.ids) == 1 or b.labels.numel() <= 400 for b in batches)
    assert max(len(b.ids) for b in batches) > 1


def test_two_processes_share_an_epoch(tmp_path):
    source = rows(tmp_path, 43)
    pair = [loader([source], ranks=2, rank=rank) for rank in range(2)]
    per_epoch = [
        [batch for stretch in range(one.plan.stretches) for batch in one.plan.batches(0, stretch)[one.rank :: 2]]
        for one in pair
    ]
    assert len(per_epoch[0]) == len(per_epoch[1])
    read = [
        [id for batch in islice(one, len(mine)) for id in batch.ids] for one, mine in zip(pair, per_epoch, strict=True)
    ]
    assert not set(read[0]) & set(read[1])
    assert sorted(read[0] + read[1]) == sorted(f"x.jsonl:{i}" for i in range(43))
    with pytest.raises(ValueError, match="as many processes as before, got 2 after 1"):
        pair[1].load_state_dict(loader([source]).state_dict())


def test_streams_are_opened_once(tmp_path):
    source = rows(tmp_path)
    source.rows = Streamed(source.rows)
    read = loader([source], workers=2)
    assert len(list(islice(read, 25))) == 25
    assert source.rows.opened == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_counted_and_left_out(workers, tmp_path, caplog):
    source = rows(tmp_path, 12, bad=(3, 7))
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write("\nnonsense")
    source.rows = JsonLines(tmp_path / "x.jsonl")
    read = loader([source], workers=workers, limits=Limits(13), bucket=1)
    (batch,) = islice(read, 1)
    assert sorted(int(id.split(":")[1]) for id in batch.ids) == [i for i in range(12) if i not in (3, 7)]
    assert read.bad == {"empty text": 2, "not JSON": 1}
    assert "left out row 3 of x.jsonl: empty text" in caplog.text
    refusing = loader([source], workers=workers, refuse=True)
    with pytest.raises(ValueError, match=r"^row \d+ of x.jsonl cannot be used: .*; mend it, or set data.on_bad=skip$"):
        list(islice(refusing, 5))


def test_a_batch_of_bad_rows_is_passed_over_but_nothing_but_bad_rows_is_not(tmp_path):
    read = loader([rows(tmp_path, 12, bad=range(11))], limits=Limits(1))
    assert [batch.ids for batch in islice(read, 3)] == [["x.jsonl:11"]] * 3
    hopeless = loader([rows(tmp_path, 12, bad=range(12))])
    with pytest.raises(ValueError, match=r"got only bad ones: empty text \(6\d rows\); check data.sources"):
        next(iter(hopeless))


def test_a_run_has_its_steps_and_no_more(tmp_path):
    read = loader([rows(tmp_path)], steps=7)
    assert len(list(read)) == len(read) == 7
    assert list(read) == []
