"""From scores and counts to kept entries: protection, tiers and tie-break live here and nowhere else.

Order of an entry: protected first, then its tier, then its score, then the larger position, then the lower
layer, then the lower head. All selectors return masks, so kept entries stay sorted by position. Nothing is
sorted for that: each row is cut where its count is reached, and only ties at the cut are put in order.
"""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

_HEADS = "(layers batch kv_heads) keys"
_POOL = "batch (layers kv_heads keys)"
_LAYERS = "(layers batch) (kv_heads keys)"
_MANY = 256
"""Different ranks above which one sort of all rows is cheaper than a selection for each rank; on CUDA it always is."""


@dataclass
class Ranking:
    """Everything that decides order, heads padded to a common length; invalid entries never count."""

    scores: Float[Tensor, "layers batch kv_heads keys"]
    positions: Int[Tensor, "layers batch kv_heads keys"]
    valid: Bool[Tensor, "layers batch kv_heads keys"]
    protected: Bool[Tensor, "layers batch kv_heads keys"]
    tiers: Int[Tensor, "layers batch kv_heads keys"] | None = None

    def __post_init__(self) -> None:
        if not (torch.isfinite(self.scores) | ~self.valid).all():
            raise ValueError("expected finite scores for every cached token, got NaN or inf; check the policy's score")
        self.protected = self.protected & self.valid


@dataclass
class _Race:
    """Rows of entries on their way to a decision: `room` of those in `contest` join `kept`."""

    kept: Bool[Tensor, "rows entries"]
    contest: Bool[Tensor, "rows entries"]
    room: Int[Tensor, " rows"]

    def first(self, favoured: Bool[Tensor, "rows entries"]) -> "_Race":
        """Favoured entries before the others."""
        wins = self.contest & favoured
        left = self.room - wins.sum(-1)
        fits = (left >= 0)[:, None]
        return _Race(
            self.kept | (wins & fits),
            torch.where(fits, self.contest & ~favoured, wins),
            torch.where(left >= 0, left, self.room),
        )

    def cut(self, keys: Float[Tensor, "rows entries"] | Int[Tensor, "rows entries"]) -> "_Race":
        """Larger keys first; entries that tie at the cut remain in the contest."""
        worst = float("-inf") if keys.is_floating_point() else torch.iinfo(keys.dtype).min
        cut = _ranked(keys.masked_fill(~self.contest, worst), self.room.clamp(min=1))[:, None]
        above = self.contest & (keys > cut)
        ties = self.contest & (keys == cut) & (self.room > 0)[:, None]
        return _Race(self.kept | above, ties, self.room - above.sum(-1))

    def settle(self) -> Bool[Tensor, "rows entries"]:
        """Earlier entries first, and the race is over."""
        return self.kept | (self.contest & (self.contest.cumsum(-1) <= self.room[:, None]))


def _ranked(
    keys: Float[Tensor, "rows entries"] | Int[Tensor, "rows entries"], ranks: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"] | Int[Tensor, " rows"]:
    """The `ranks`-th largest key of each row, counted from 1."""
    different = [] if keys.is_cuda else ranks.unique().tolist()
    if keys.is_cuda or len(different) > _MANY:
        return keys.sort(-1, descending=True).values.gather(-1, ranks[:, None] - 1).squeeze(-1)
    found = torch.empty_like(keys[:, 0])
    for rank in different:
        rows = ranks == rank
        chosen = keys if len(different) == 1 else keys[rows]
        found[rows] = chosen.kthvalue(keys.shape[-1] + 1 - rank, -1).values
    return found


def _best(ranking: Ranking, counts: Int[Tensor, "..."], rows: str) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """Mask of the `counts` best valid entries of each row; `rows` says which entries compete."""
    if not ranking.valid.numel():
        return ranking.valid

    def laid(x: Tensor) -> Tensor:
        return rearrange(x, f"layers batch kv_heads keys -> {rows}")

    contest = laid(ranking.valid)
    room = torch.minimum(counts.flatten(), contest.sum(-1))
    race = _Race(torch.zeros_like(contest), contest, room).first(laid(ranking.protected))
    if ranking.tiers is not None:
        race = race.cut(laid(ranking.tiers))
    race = race.cut(laid(ranking.scores.float()))
    tied = (race.contest.sum(-1) > race.room).any()
    kept = race.cut(laid(ranking.positions)).settle() if tied else race.kept | race.contest
    sizes = dict(zip(("layers", "batch", "kv_heads"), ranking.valid.shape, strict=False))
    return rearrange(kept, f"{rows} -> layers batch kv_heads keys", **sizes)


def _check(needed: Int[Tensor, "*rows"], counts: Int[Tensor, "*rows"]) -> None:
    short = needed > counts
    if short.any():
        raise ValueError(
            f"protected tokens alone exceed the budget: {int(needed[short][0])} protected, budget for "
            f"{int(counts[short][0])}; raise the budget, or lower sink_size, recent_size or min_per_head, "
            "switch protect_text off, or protect fewer tokens in your mask"
        )


def keep_per_head(
    ranking: Ranking, counts: Int[Tensor, "layers batch kv_heads"]
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """Each head keeps its own `counts` best entries.

    Raises:
        ValueError: when a head's protected entries exceed its count.
    """
    _check(ranking.protected.sum(-1), torch.minimum(counts, ranking.valid.sum(-1)))
    return _best(ranking, counts, _HEADS)


def keep_by_modality(
    ranking: Ranking,
    visual: Bool[Tensor, "layers batch kv_heads keys"],
    visual_counts: Int[Tensor, "layers batch kv_heads"],
    text_counts: Int[Tensor, "layers batch kv_heads"],
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """Each head keeps its best visual and its best text entries, counted apart.

    A modality whose protected entries exceed its count takes the rest from the other one.

    Raises:
        ValueError: when a head's protected entries exceed both counts together.
    """
    totals = torch.minimum(visual_counts + text_counts, ranking.valid.sum(-1))
    seen, read = (ranking.protected & visual).sum(-1), (ranking.protected & ~visual).sum(-1)
    _check(seen + read, totals)
    visual_counts = torch.minimum(torch.maximum(visual_counts, seen), totals - read)
    parts = ((visual, visual_counts), (~visual, totals - visual_counts))
    masks = [_best(replace(ranking, valid=ranking.valid & own), counts, _HEADS) for own, counts in parts]
    return masks[0] | masks[1]


def keep_per_layer(
    ranking: Ranking, counts: Int[Tensor, "layers batch kv_heads"]
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """One set of positions per layer, ranked by the mean score over its heads; needs heads of equal content."""
    places = ranking.positions.masked_fill(~ranking.valid, -1)
    if not (places == places[:, :, :1]).all():
        raise ValueError(
            "selector 'layer' needs the same entries in all heads, got heads that differ; use selector 'head'"
        )
    scores = ranking.scores.float().masked_fill(~ranking.valid, 0.0)
    mean = scores.mean(2, keepdim=True).expand_as(scores)
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
        ranking = _with_floors(ranking, floor)
    _check(ranking.protected.sum((0, 2, 3)), torch.minimum(totals, ranking.valid.sum((0, 2, 3))))
    return _best(ranking, totals, _POOL)


def _with_floors(ranking: Ranking, floors: Int[Tensor, "layers batch kv_heads"]) -> Ranking:
    """The same, with each head's best entries protected."""
    return replace(ranking, protected=_best(ranking, floors, _HEADS) | ranking.protected)


def keep_by_layer_pool(
    ranking: Ranking, totals: Int[Tensor, "layers batch"], floors: Int[Tensor, "layers batch kv_heads"]
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """The heads of a layer compete for its total; each head's `floors` best entries are protected first.

    Raises:
        ValueError: when protected entries alone exceed a total.
    """
    _check(ranking.protected.sum((2, 3)), torch.minimum(totals, ranking.valid.sum((2, 3))))
    return _best(_with_floors(ranking, floors), totals, _LAYERS)


def keep_threshold(
    ranking: Ranking, threshold: float | Float[Tensor, " batch"]
) -> Bool[Tensor, "layers batch kv_heads keys"]:
    """Every entry whose score reaches `threshold` (one, or one for each row), and the protected ones.

    The realised budget is an output.
    """
    limit = threshold[None, :, None, None] if isinstance(threshold, Tensor) else threshold
    return ((ranking.scores >= limit) | ranking.protected) & ranking.valid
