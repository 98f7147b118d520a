"""Prompts that are too long, cut by tokens as benchmarks cut them; questions and evidence stay what they are."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from retention.data.example import EvidenceRef, Example, Segment, TextRef, Turn
from retention.data.template import Template

Cut = tuple[int, int]


def shortened(example: Example, template: Template, image_tokens: Callable[[np.ndarray], int]) -> Example:
    """The example within its limit: an interval of tokens leaves the context, images that it touches leave whole.

    Raises:
        ValueError: where the limit leaves no room for the question.
    """
    limit = example.limit
    if limit is None:
        return example
    sizes = [image_tokens(s.payload) if s.kind == "image" else len(template.ids(s.payload)) for s in example.segments]
    context = sum(sizes)
    total = context + len(template.ids(example.turns[0].question))
    if total <= limit.tokens:
        return example
    start = limit.tokens // 2 if limit.where == "middle" else sum(sizes[: limit.kept])
    end = start + total - limit.tokens
    if end > context:
        raise ValueError(
            f"expected a limit with room for the question of {total - context} tokens, got {limit.tokens} for {example.id}"
        )
    return _without(example, template, sizes, (start, end))


def _without(example: Example, template: Template, sizes: list[int], cut: Cut) -> Example:
    """The example without the tokens of an interval over its context."""
    segments: list[Segment] = []
    removed: list[Cut | None] = []
    place = 0
    for segment, size in zip(example.segments, sizes, strict=True):
        start, end = max(0, cut[0] - place), min(size, cut[1] - place)
        place += size
        if start >= end:
            segments.append(segment)
            removed.append((0, 0))
        elif segment.kind == "image" or (start, end) == (0, size):
            removed.append(None)
        else:
            characters = _characters(segment.payload, template, (start, end))
            segments.append(Segment("text", segment.payload[: characters[0]] + segment.payload[characters[1] :]))
            removed.append(characters)
    turns = [_moved(turn, example, removed) for turn in example.turns]
    return replace(example, segments=segments, turns=turns, meta=example.meta | {"cut_tokens": cut[1] - cut[0]})


def _characters(text: str, template: Template, cut: Cut) -> Cut:
    """Characters of a stretch of tokens."""
    if getattr(template.tokenizer, "is_fast", False):
        given = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return given[cut[0]][0], given[cut[1] - 1][1]
    ids = template.ids(text)
    start = len(template.tokenizer.decode(ids[: cut[0]]))
    return start, max(start, len(text) - len(template.tokenizer.decode(ids[cut[1] :])))


def _moved(turn: Turn, example: Example, removed: list[Cut | None]) -> Turn:
    """The turn with its evidence where it is now; without any, where some of it is gone."""
    images = [i for i, segment in enumerate(example.segments) if segment.kind == "image"]
    found: list[EvidenceRef | TextRef] = []
    for ref in turn.evidence:
        segment = ref.segment if isinstance(ref, TextRef) else images[ref.image]
        gone = removed[segment]
        before = sum(cut is None for cut in removed[:segment])
        if gone is None:
            return replace(turn, evidence=[])
        if not isinstance(ref, TextRef):
            missing = sum(removed[i] is None for i in images[: ref.image])
            found.append(replace(ref, image=ref.image - missing))
        elif ref.end <= gone[0] or ref.start >= gone[1]:
            shift = gone[1] - gone[0] if ref.start >= gone[1] else 0
            found.append(TextRef(ref.segment - before, ref.start - shift, ref.end - shift))
        else:
            return replace(turn, evidence=[])
    return replace(turn, evidence=found)
