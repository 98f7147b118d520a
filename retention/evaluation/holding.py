"""What a row says of what its cache held: entries by layer and modality, the evidence of its turn and where that lies."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from retention.cache.evicting import EvictingCache
from retention.evaluation.looks import KINDS

Row = dict[str, Any]
Table = Bool[Tensor, "layers batch kv_heads positions"]


def visual_positions(cache: EvictingCache) -> Bool[Tensor, "batch positions"]:
    """Which positions of each row are visual tokens, padding left out."""
    tokens = cache.tokens
    laid = torch.zeros(len(tokens.valid), len(tokens) + 1, dtype=torch.bool, device=tokens.valid.device)
    place = torch.where(tokens.valid, tokens.valid.long().cumsum(1) - 1, len(tokens))
    return laid.scatter(1, place, tokens.visual)[:, :-1]


def kept_by(table: Table, visual: Bool[Tensor, "batch positions"]) -> list[Row]:
    """Of each row of a batch the kept entries of every layer over its heads, and of text and images over all layers."""
    held = table.sum(2)
    kinds = torch.stack([(held * ~visual).sum((0, 2)), (held * visual).sum((0, 2))], -1)
    rows = zip(held.sum(-1).T.tolist(), kinds.tolist(), strict=True)
    return [{"layer": layers, "modality": dict(zip(KINDS, counts, strict=True))} for layers, counts in rows]


def evidence_recall(
    table: Bool[Tensor, "layers kv_heads positions"], evidence: list[int] | None
) -> dict[str, float | None]:
    """Share of a turn's evidence held in any layer and head, and on average over them; missing without positions."""
    if not evidence:
        return {"any": None, "mean": None}
    held = table[..., torch.tensor(evidence)]
    return {"any": float(held.any(0).any(0).float().mean()), "mean": float(held.float().mean())}


def depth(evidence: list[int] | None, length: int) -> float | None:
    """Where a turn's evidence lies on average, 0 at the context's first token and near 1 at its last."""
    return sum(evidence) / len(evidence) / length if evidence else None


def distance(evidence: list[int] | None, seen: int, stretch: float) -> float | None:
    """How many positions a turn's evidence lies before the end of what was read, on average, stretched as they are.

    The question of the first turn follows there; those of later turns stand as much further off as turns came between.
    """
    return (seen - sum(evidence) / len(evidence)) * stretch if evidence else None
