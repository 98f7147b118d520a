"""From scores and counts to kept entries: protection, tiers and tie-break live here and nowhere else.

Order of an entry: protected first, then its tier, then its score, then the larger position, then the lower
layer, then the lower head. All selectors return masks, so kept entries stay sorted by position.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Ranking:
    """Everything that decides order, heads padded to a common length; invalid entries never count."""

    scores: Float[Tensor, "layers batch kv_heads keys"]
    positions: Int[Tensor, "layers batch kv_heads keys"]
    valid: Bool[Tensor, "layers batch kv_heads keys"]
    protected: Bool[Tensor, "layers batch kv_heads keys"]
    tiers: Int[Tensor, "layers batch kv_heads keys"] | None = None

    def __post_init__(self) -> None:
        if not torch.isfinite(self.scores[self.valid]).all():
            raise ValueError("expected finite scores for every cached token, got NaN or inf; check the policy's score")
        self.protected = self.protected & self.valid


def _order(
    scores: Float[Tensor, "*rows entries"],
    classes: Int[Tensor, "*rows entries"],
    positions: Int[Tensor, "*rows entries"],
) -> Int[Tensor, "*rows entries"]:
    """Indices from best to worst by (class, score, position), earlier index on full ties."""
    order = positions.argsort(dim=-1, descending=True, stable=True)
    for key in (scores, classes):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return order


def _best(ranking: "_Rows", counts: Int[Tensor, "*rows"]) -> Bool[Tensor, "*rows entries"]:
    """Mask of the `counts` best entries of each row."""
    order = _order(ranking.scores, ranking.classes, ranking.positions)
    chosen = torch.arange(order.shape[-1], device=order.device) < counts.unsqueeze(-1)
    return torch.zeros_like(ranking.valid).scatter(-1, order, chosen) & ranking.valid


@dataclass
class _Rows:
    """Entries arranged so that the last axis competes."""

    scores: Tensor
    classes: Tensor
    positions: Tensor
    valid: Tensor


def _rows(ranking: Ranking, pattern: str) -> _Rows:
    tiers = torch.zeros_like(ranking.positions) if ranking.tiers is None else ranking.tiers
    if tiers.numel():
        tiers = torch.where(ranking.protected, tiers.amax() + 1, tiers).masked_fill(~ranking.valid, tiers.amin() - 1)
    parts = (ranking.scores.float().masked_fill(~ranking.valid, 0.0), tiers, ranking.positions, ranking.valid)
    return _Rows(*(rearrange(x, f"layers batch kv_heads keys -> {pattern}") for x in parts))


def _check(needed: Int[Tensor, "*rows"], counts: Int[Tensor, "*rows"]) -> None:
    short = needed > counts
    if short.any():
        raise ValueError(
            f"protected tokens alone exceed the budget: {int(needed[short][0])} protected, budget for "
            f"{int(counts[short][0])}; raise the budget or lower sink_size and recent_size"
        )


def keep_per_head(
    ranking: Ranking, counts: Int[Tensor, "layers batch kv_heads"]
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """Each head keeps its own `counts` best entries.

    Raises:
        ValueError: when a head's protected entries exceed its count.
    """
    _check(ranking.protected.sum(-1), torch.minimum(counts, ranking.valid.sum(-1)))
    return _best(_rows(ranking, "layers batch kv_heads keys"), counts)


def keep_per_layer(
    ranking: Ranking, counts: Int[Tensor, "layers batch kv_heads"]
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """One set of positions per layer, ranked by the mean score over its heads; needs heads of equal content."""
    if not (ranking.positions == ranking.positions[:, :, :1]).all():
        raise ValueError(
            "selector 'layer' needs the same entries in all heads, got heads that differ; use selector 'head'"
        )
    mean = ranking.scores.float().mean(2, keepdim=True).expand_as(ranking.scores)
    return keep_per_head(Ranking(mean, ranking.positions, ranking.valid, ranking.protected, ranking.tiers), counts)


def keep_global(
    ranking: Ranking, totals: Int[Tensor, " batch"], *, min_per_head: int = 0
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """All layers and heads of a sequence compete for `totals` entries (arXiv 2605.09649).

    Each head's `min_per_head` best entries are protected first.

    Raises:
        ValueError: when protected entries alone exceed the total.
    """
    if min_per_head:
        floor = torch.full(ranking.valid.shape[:3], min_per_head, device=ranking.valid.device)
        held = _best(_rows(ranking, "layers batch kv_heads keys"), floor) | ranking.protected
        ranking = Ranking(ranking.scores, ranking.positions, ranking.valid, held, ranking.tiers)
    layers, kv_heads = ranking.valid.shape[0], ranking.valid.shape[2]
    _check(ranking.protected.sum((0, 2, 3)), torch.minimum(totals, ranking.valid.sum((0, 2, 3))))
    kept = _best(_rows(ranking, "batch (layers kv_heads keys)"), totals)
    return rearrange(
        kept, "batch (layers kv_heads keys) -> layers batch kv_heads keys", layers=layers, kv_heads=kv_heads
    )


def keep_threshold(ranking: Ranking, threshold: float) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """Every entry whose score reaches `threshold`, and the protected ones; the realised budget is an output."""
    return ((ranking.scores >= threshold) | ranking.protected) & ranking.valid
