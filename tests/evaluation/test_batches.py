"""Contexts that are read together: alike in how they are asked, near in length, none lost."""

import numpy as np

from retention.data.example import Example, Segment, Turn
from retention.evaluation import batches
from retention.evaluation.batches import batches_of


def example(number, words, turns=1, image=False, **more):
    segments = [Segment("text", "w " * words)]
    segments += [Segment("image", np.zeros((40, 40, 3), np.uint8))] if image else []
    return Example(str(number), segments, [Turn("?", "!")] * turns, "after", **more)


def test_every_context_is_in_one_batch_with_its_like():
    rng = np.random.default_rng(0)
    many = [
        example(i, int(rng.integers(1, 500)), 1 + i % 2, image=i % 3 == 0, independent=i % 5 == 0) for i in range(97)
    ]
    found = list(batches_of(many, 8))
    assert sorted(int(e.id) for batch in found for e in batch) == list(range(97))
    assert all(len(batch) <= 8 and len({batches.manner(e) for e in batch}) == 1 for batch in found)
    spread = [max(len(e.segments[0].payload) for e in b) - min(len(e.segments[0].payload) for e in b) for b in found]
    assert np.mean(spread) < 500


def test_contexts_of_one_length_stay_in_their_order():
    found = list(batches_of([example(i, 5) for i in range(10)], 4))
    assert [[e.id for e in batch] for batch in found] == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]


def test_little_is_held_while_looking(monkeypatch):
    monkeypatch.setattr(batches, "PIXELS", 3 * 40 * 40 * 3)
    drawn = []

    def draw():
        for i in range(40):
            drawn.append(i)
            yield example(i, 5, image=True)

    next(batches_of(draw(), 2))
    assert len(drawn) == 4
