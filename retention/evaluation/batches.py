"""Which contexts are read together: those that are asked in the same way, of like length."""

from collections.abc import Iterable, Iterator

from retention.data.example import Example

AHEAD = 8
"""Batches that contexts of like length are looked for among."""
PIXELS = 2**28
"""Bytes of images that are held while looking."""


def batches_of(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """At most `size` at a time, in the order of their kind and length within every stretch of contexts."""
    waiting: list[Example] = []
    pixels = 0
    for example in examples:
        waiting.append(example)
        pixels += sum(image.nbytes for image in example.images)
        if len(waiting) == size * AHEAD or pixels > PIXELS:
            yield from _cut(waiting, size)
            waiting, pixels = [], 0
    yield from _cut(waiting, size)


def _cut(waiting: list[Example], size: int) -> Iterator[list[Example]]:
    """Neighbours of one manner."""
    ordered = sorted(waiting, key=lambda example: (manner(example), _length(example)))  # stable: equals stay as drawn
    batch: list[Example] = []
    for example in ordered:
        if batch and (len(batch) == size or manner(batch[0]) != manner(example)):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def manner(example: Example) -> tuple:
    """What the contexts of one batch share: how many turns of which length, and what stands around them."""
    media = (bool(example.images), bool(example.later), any(s.kind == "image" for s in example.later))
    how = (example.plain, example.independent, example.evicts_answers, example.stretch)
    return *media, *how, tuple(turn.max_new_tokens for turn in example.turns)


def _length(example: Example) -> int:
    """A guess that orders contexts: characters, and the area of images in places of a letter."""
    segments = [*example.segments, *example.later]
    return sum(len(s.payload) if s.kind == "text" else s.payload.size // 400 for s in segments)
