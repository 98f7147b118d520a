"""What is fed behind a prompt: the prompt itself once more, in chunks, or the questions to come with their answers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.cache.evicting import EvictingCache
from retention.cache.inputs import Part
from retention.policies.collect import Foresight, Repetition


@dataclass
class Feed:
    """One forward behind a cache, right-padded."""

    embeddings: Float[Tensor, "batch fed hidden"]
    valid: Bool[Tensor, "batch fed"]
    asking: Bool[Tensor, "batch fed"]
    """Queries that are listened to."""
    places: Int[Tensor, "axes batch fed"]
    span: tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]] | None = None
    """Sequence positions of the entries it is measured against, [from, to); None for all."""
    sinks: int = 0
    """First tokens of the sequence that it is measured against as well."""
    weighed: bool = False
    summed: bool = False
    beside: dict[str, Any] = field(default_factory=dict)
    """What the model adds to visual tokens behind its first layers."""

    def measured(self, positions: Int[Tensor, "batch kv_heads keys"]) -> Bool[Tensor, "batch kv_heads keys"]:
        """Entries that take part in the softmax, beside the feed itself."""
        if self.span is None:
            return torch.ones_like(positions, dtype=torch.bool)
        first, end = (x[:, None, None] for x in self.span)
        return ((positions >= first) & (positions < end)) | (positions < self.sinks)


def repeated(
    decoder: Any, cache: EvictingCache, plan: Repetition, encode: Callable[[str], list[int]]
) -> Iterator[Feed]:
    """All that came since the last pass, `plan.chunk` tokens of each row at a time.

    A later chunk is opened by the last tokens of the one before. Images are repeated as the embeddings that were fed,
    each at the coordinates it had, moved behind all that was seen.
    """
    inputs = cache.tokens.inputs
    if not inputs.parts:
        return
    assert inputs.next is not None
    embeddings, places = _joined(decoder, inputs.parts)
    numbers, deep = _visual(inputs.parts)
    valid = cache.tokens.valid[:, inputs.first :]
    order, counts = (~valid).long().argsort(dim=1, stable=True), valid.sum(1)
    before = cache.tokens.valid[:, : inputs.first].sum(1)
    for start in range(0, int(counts.max()), plan.chunk):
        words = torch.tensor(encode(plan.words[start > 0]), dtype=torch.long, device=valid.device)
        first = max(start - plan.overlap, 0)
        columns = order[:, first : start + plan.chunk]
        real = (torch.arange(first, first + columns.shape[1], device=valid.device) < counts[:, None]) & (
            start < counts[:, None]
        )
        prefix = _embedded(decoder, words).to(embeddings.dtype).expand(len(valid), -1, -1)
        body = embeddings.gather(1, columns[..., None].expand(*columns.shape, embeddings.shape[-1]))
        fed = torch.cat([(start < counts)[:, None].expand(-1, len(words)), real], 1)
        ends = torch.minimum(counts, counts.new_tensor(start + plan.chunk))
        yield Feed(
            torch.cat([prefix, body], 1),
            fed,
            fed,
            _places(places.gather(2, columns.expand(len(places), -1, -1)), real, inputs.next, len(words)),
            (before + start, before + ends),
            plan.sinks,
            plan.weighed,
            beside=_beside(numbers, deep, columns, real, len(words)),
        )


def foreseen(decoder: Any, cache: EvictingCache, plan: Foresight) -> Iterator[Feed]:
    """The questions with their answers, as one dialogue."""
    inputs, device = cache.tokens.inputs, cache.tokens.valid.device
    answers = inputs.answers
    assert answers is not None
    assert inputs.next is not None
    if len(answers.ids) != len(cache.tokens.valid):
        raise ValueError(
            f"expected answers for {len(cache.tokens.valid)} rows, as the cache holds, got {len(answers.ids)}; give one "
            "dialogue per sequence"
        )
    ids, valid, reading = (x.to(device) for x in (answers.ids, answers.valid, answers.reading))
    places = inputs.next[:, None] + torch.arange(ids.shape[1], device=device)
    asking = valid if plan.questions else reading & valid
    yield Feed(_embedded(decoder, ids), valid, asking, places[None], summed=plan.mean)


def _embedded(decoder: Any, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape hidden"]:
    return decoder.get_input_embeddings()(ids)


def _joined(
    decoder: Any, parts: list[Part]
) -> tuple[Float[Tensor, "batch tokens hidden"], Int[Tensor, "axes batch tokens"]]:
    """Embeddings and coordinates of all parts; text without coordinates of several axes has all alike."""
    axes = max(len(part.places) for part in parts)
    fed = [part.fed if part.fed.is_floating_point() else _embedded(decoder, part.fed) for part in parts]
    return torch.cat(fed, 1), torch.cat([part.places.expand(axes, -1, -1) for part in parts], 2)


def _visual(parts: list[Part]) -> tuple[Int[Tensor, "batch tokens"] | None, list[Float[Tensor, "visual hidden"]]]:
    """Which row of the deep features belongs to each token, -1 for none, and the features."""
    known = [part.deep for part in parts if part.deep is not None]
    if not known:
        return None, []
    numbers, total = [], 0
    for part in parts:
        own = torch.full(part.fed.shape[:2], -1, device=part.fed.device)
        if part.visual is not None and part.deep is not None:
            order = (part.visual.flatten().long().cumsum(0) - 1).view(own.shape) + total
            own, total = torch.where(part.visual, order, own), total + len(part.deep[0])
        numbers.append(own)
    return torch.cat(numbers, 1), [torch.cat(levels) for levels in zip(*known, strict=True)]


def _beside(
    numbers: Int[Tensor, "batch tokens"] | None,
    deep: list[Tensor],
    columns: Int[Tensor, "batch body"],
    real: Bool[Tensor, "batch body"],
    words: int,
) -> dict[str, Any]:
    """Arguments of the decoder for the visual tokens among some columns."""
    if numbers is None:
        return {}
    chosen = torch.where(real, numbers.gather(1, columns), -1)
    chosen = torch.cat([chosen.new_full((len(chosen), words), -1), chosen], 1)
    visual = chosen >= 0
    features = [level[chosen[visual]] for level in deep]
    return {"visual_pos_masks": visual, "deepstack_visual_embeds": features}


def _places(
    body: Int[Tensor, "axes batch body"],
    real: Bool[Tensor, "batch body"],
    upcoming: Int[Tensor, " batch"],
    words: int,
) -> Int[Tensor, "axes batch fed"]:
    """Coordinates behind all that was seen: the words one after the other, then the body as it lay."""
    lead = upcoming[:, None] + torch.arange(words, device=body.device)
    least = body.masked_fill(~real, body.amax() + 1).amin((0, 2))
    moved = body + (upcoming + words - least)[:, None]
    return torch.cat([lead.expand(len(body), -1, -1), torch.where(real, moved, 0)], 2)
