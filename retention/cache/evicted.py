"""What becomes of entries that leave: merged into the kept entries whose keys are most like theirs, or that are nearest.

Merging mixes keys that are rotated to different places, and a merged entry counts as one.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

MERGES = ("pivot", "average", "weighted", "nearest")
BLOCK = 512
"""Evicted entries compared with all kept ones at a time."""

Entries = Float[Tensor, "batch kv_heads keys width"]
Positions = Int[Tensor, "batch kv_heads keys"] | None
Values = Float[Tensor, "batch kv_heads keys value_width"]
Merged = tuple[Float[Tensor, "entries width"], Float[Tensor, "entries value_width"]]


def naive_merged(
    keys: Entries,
    values: Values,
    kept: Bool[Tensor, "batch kv_heads keys"],
    evicted: Bool[Tensor, "batch kv_heads keys"],
    how: str,
    positions: Positions = None,
) -> Merged:
    """Keys and values of the kept entries, in order, each the mean of itself and what its evicted entries bring.

    An evicted entry e goes to the kept entry c of its head whose key has the largest cosine, values along with keys.
    It brings `(x_e + x_c) / 2` (pivot), `x_e` (average) or `cos * x_e` (weighted) (LOOK-M, arXiv 2406.18139). With
    `nearest` it goes to the kept entry of the nearest position instead, the earlier of two, and brings `x_e`
    (ElasticCache, arXiv 2407.18121); without positions, entries are counted.
    """
    merged = [x.clone() for x in (keys, values)]
    for row, head in torch.ones(keys.shape[:2]).nonzero().tolist():
        slots = torch.nonzero(kept[row, head]).flatten().tolist()
        brought: dict[int, list[tuple[int, float]]] = {slot: [] for slot in slots}
        for leaving in torch.nonzero(evicted[row, head]).flatten().tolist() if slots else []:
            one = keys[row, head]
            place = list(range(len(one))) if positions is None else positions[row, head].tolist()
            away = [(abs(place[leaving] - place[slot]), place[slot]) for slot in slots]
            cosines = [float(F.cosine_similarity(one[leaving].float(), one[slot].float(), dim=0)) for slot in slots]
            best = max(range(len(slots)), key=cosines.__getitem__)
            best = min(range(len(slots)), key=away.__getitem__) if how == "nearest" else best
            brought[slots[best]].append((leaving, cosines[best]))
        for slot, leaving_ones in brought.items():
            for x, out in zip((keys, values), merged, strict=True):
                x = x[row, head].float()
                gifts = {
                    "pivot": [(x[e] + x[slot]) / 2 for e, _ in leaving_ones],
                    "average": [x[e] for e, _ in leaving_ones],
                    "nearest": [x[e] for e, _ in leaving_ones],
                    "weighted": [cosine * x[e] for e, cosine in leaving_ones],
                }[how]
                out[row, head, slot] = torch.stack([x[slot], *gifts]).mean(0).to(out.dtype)
    return merged[0][kept], merged[1][kept]


def merged(
    keys: Entries,
    values: Values,
    kept: Bool[Tensor, "batch kv_heads keys"],
    evicted: Bool[Tensor, "batch kv_heads keys"],
    how: str,
    positions: Positions = None,
) -> Merged:
    """The same for all heads at once; kept entries that nothing joins stay bit for bit."""
    stay, leave = _slots(kept), _slots(evicted)
    if not stay.shape[-1] or not leave.shape[-1]:
        return keys[kept], values[kept]
    present = kept.gather(-1, stay)
    own = [_rows(x, stay) for x in (keys, values)]
    anchors = F.normalize(own[0].float(), dim=-1).transpose(-1, -2)
    sums = [torch.zeros(x.shape, device=x.device) for x in own]
    joined = torch.zeros(stay.shape, device=keys.device)
    numbers = torch.arange(stay.shape[-1], device=keys.device)
    for slots in leave.split(BLOCK, -1):
        leaving = (evicted.gather(-1, slots) & present.any(-1, keepdim=True))[..., None]
        gone = [_rows(x, slots).float().masked_fill(~leaving, 0.0) for x in (keys, values)]
        alike = F.normalize(gone[0], dim=-1) @ anchors if how != "nearest" else _nearness(slots, stay, positions)
        cosine, home = alike.masked_fill(~present[:, :, None], float("-inf")).max(-1, keepdim=True)
        moves = ((home == numbers) & leaving).float()
        joined = joined + moves.sum(2)
        if how == "weighted":
            moves = moves * cosine.masked_fill(~leaving, 0.0)
        sums = [total + moves.transpose(-1, -2) @ x for total, x in zip(sums, gone, strict=True)]
    mixed = [_mean(x, total, joined[..., None], how)[present] for x, total in zip(own, sums, strict=True)]
    return mixed[0], mixed[1]


def _nearness(
    leaving: Int[Tensor, "batch kv_heads some"], staying: Int[Tensor, "batch kv_heads most"], positions: Positions
) -> Float[Tensor, "batch kv_heads some most"]:
    """The larger, the nearer; the earlier of two is nearer. Exact up to eight million positions."""
    if positions is not None:
        leaving, staying = positions.gather(-1, leaving), positions.gather(-1, staying)
    away = leaving[..., None] - staying[:, :, None]
    return -(2 * away.abs() + (away < 0)).float()


def _mean(own: Entries, brought: Entries, count: Float[Tensor, "batch kv_heads keys 1"], how: str) -> Entries:
    """Kept entries with what is brought to them, the sum of `count` gifts, in fp32."""
    wide = own.float()
    gifts = (brought + count * wide) / 2 if how == "pivot" else brought
    return torch.where(count > 0, ((wide + gifts) / (1 + count)).to(own.dtype), own)


def _slots(marked: Bool[Tensor, "batch kv_heads keys"]) -> Int[Tensor, "batch kv_heads most"]:
    """Where the marked entries of each head are, in order, filled up with others to the most of any head."""
    return marked.long().argsort(dim=-1, descending=True, stable=True)[..., : int(marked.sum(-1).max())]


def _rows(entries: Entries, slots: Int[Tensor, "batch kv_heads some"]) -> Float[Tensor, "batch kv_heads some width"]:
    return entries.gather(2, slots[..., None].expand(*slots.shape, entries.shape[-1]))
