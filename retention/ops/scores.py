"""Steps that several policies' scores share."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256


def pool_along_entries(
    scores: Float[Tensor, "batch kv_heads keys"], valid: Bool[Tensor, "batch kv_heads keys"], kernel_size: int
) -> Float[Tensor, "batch kv_heads keys"]:
    """Average over each entry's neighbours, odd kernel, same length; holes and padding are left out and closed up."""
    order = (~valid).long().argsort(dim=-1, stable=True)
    near = [x.float().gather(-1, order) for x in (scores * valid, valid)]
    total, count = (F.avg_pool1d(x, kernel_size, stride=1, padding=kernel_size // 2) for x in near)
    pooled = total / count.clamp(min=1 / kernel_size)
    return torch.zeros_like(pooled).scatter(-1, order, pooled)


def pool_apart(
    scores: Float[Tensor, "batch kv_heads keys"],
    valid: Bool[Tensor, "batch kv_heads keys"],
    window: Bool[Tensor, "batch kv_heads keys"],
    kernel_size: int,
    *,
    largest: bool = False,
) -> Float[Tensor, "batch kv_heads keys"]:
    """Mean, or the `largest`, of each entry's neighbours; those in the window are no neighbours of those before it."""
    pool = peak_along_entries if largest else pool_along_entries
    inside, before = (pool(scores, valid & kind, kernel_size) for kind in (window, ~window))
    return torch.where(window, inside, before)


def mean_over_heads(
    values: Float[Tensor, "batch kv_heads keys"],
    positions: Int[Tensor, "batch kv_heads keys"],
    valid: Bool[Tensor, "batch kv_heads keys"],
) -> Float[Tensor, "batch kv_heads keys"]:
    """Each entry's mean over the heads that hold its position, so that a layer's heads rank alike; 0 where invalid."""
    length = int(positions.max()) + 1
    slots = torch.where(valid, positions, length)
    mean = F.pad(mass_by_position(values, positions, valid, length), (0, 1))
    return mean.gather(1, slots.flatten(1)).view(values.shape)


def peak_along_entries(
    scores: Float[Tensor, "batch kv_heads keys"], valid: Bool[Tensor, "batch kv_heads keys"], kernel_size: int
) -> Float[Tensor, "batch kv_heads keys"]:
    """The largest among each entry's neighbours, odd kernel; holes and padding are 0, left out and closed up."""
    order = (~valid).long().argsort(dim=-1, stable=True)
    near = scores.float().masked_fill(~valid, float("-inf")).gather(-1, order)
    peaks = F.max_pool1d(near, kernel_size, stride=1, padding=kernel_size // 2).nan_to_num(neginf=0.0)
    return torch.zeros_like(peaks).scatter(-1, order, peaks) * valid


def mean_row(rows: Float[Tensor, "batch kv_heads rows keys"]) -> Float[Tensor, "batch kv_heads keys"]:
    """Mean over the rows that saw something: queries that are padding left rows of 0."""
    return rows.sum(2) / (rows > 0).any(-1).sum(-1)[..., None].clamp(min=1)


def row_moments(
    rows: Float[Tensor, "batch kv_heads groups rows keys"],
) -> tuple[
    Float[Tensor, "batch kv_heads keys"], Float[Tensor, "batch kv_heads keys"], Float[Tensor, "batch kv_heads keys"]
]:
    """Mean and variance over the rows that saw something, and the sum over rows of -A log A; all averaged over groups."""
    real = (rows > 0).any(-1, keepdim=True)
    count = real.sum(3).clamp(min=1)
    mean = rows.sum(3) / count
    variance = ((rows - mean[:, :, :, None]).square() * real).sum(3) / count
    entropy = torch.special.entr(rows).sum(3)
    return mean.mean(2), variance.mean(2), entropy.mean(2)


def covering_count(
    scores: Float[Tensor, "*rows keys"], among: Bool[Tensor, "*rows keys"], share: float
) -> Int[Tensor, "*rows"]:
    """How many of the largest scores (0 or more) `among` some entries add up to a share of their sum."""
    ordered = (scores * among).double().sort(-1, descending=True).values
    reached = ordered.cumsum(-1) >= share * ordered.sum(-1, keepdim=True) * (1 - 1e-9)
    needed = ordered.shape[-1] - reached.sum(-1) + 1
    return torch.where((ordered > 0).any(-1), needed, 0)


def unit_range(
    scores: Float[Tensor, "batch kv_heads keys"], valid: Bool[Tensor, "batch kv_heads keys"]
) -> Float[Tensor, "batch kv_heads keys"]:
    """Scores of each head moved and scaled to [0, 1]; 0 where all are equal, and at holes."""
    low = scores.masked_fill(~valid, float("inf")).amin(-1, keepdim=True)
    high = scores.masked_fill(~valid, float("-inf")).amax(-1, keepdim=True)
    return torch.where(valid & (high > low), (scores - low) / (high - low).clamp(min=1e-20), 0.0)


def mass_by_position(
    scores: Float[Tensor, "batch kv_heads keys"],
    positions: Int[Tensor, "batch kv_heads keys"],
    valid: Bool[Tensor, "batch kv_heads keys"],
    length: int,
) -> Float[Tensor, "batch positions"]:
    """Mean over the heads that hold a position, by position; 0 where none does."""
    slots = torch.where(valid, positions, length)
    total = torch.zeros(len(scores), length + 1, device=scores.device)
    count = torch.zeros_like(total)
    for score, slot in zip(scores.float().unbind(1), slots.unbind(1), strict=True):
        total.scatter_add_(1, slot, score)  # head by head: no slot twice, so the order of addition is fixed
        count.scatter_add_(1, slot, torch.ones_like(score))
    return (total / count.clamp(min=1))[:, :length]


def naive_redundancy(
    keys: Float[Tensor, "batch kv_heads keys head_dim"], valid: Bool[Tensor, "batch kv_heads keys"], threshold: float
) -> Float[Tensor, "batch kv_heads keys"]:
    """How like the other entries of its head each key is: mean over rows of the cosines, the latest copy left out.

    The diagonal is 0, and in each row so is the latest entry above `threshold`.
    """
    found = torch.zeros(valid.shape)
    for row, head in torch.cartesian_prod(torch.arange(len(valid)), torch.arange(valid.shape[1])).tolist():
        places = torch.nonzero(valid[row, head]).flatten()
        unit = F.normalize(keys[row, head, places].float(), dim=-1)
        alike = (unit @ unit.T).fill_diagonal_(0.0)
        for i in range(len(places)):
            copies = torch.nonzero(alike[i] > threshold).flatten().tolist()
            if copies:
                alike[i, copies[-1]] = 0.0
        found[row, head, places] = alike.mean(0)
    return found


def redundancy(
    keys: Float[Tensor, "batch kv_heads keys head_dim"], valid: Bool[Tensor, "batch kv_heads keys"], threshold: float
) -> Float[Tensor, "batch kv_heads keys"]:
    """The same in blocks of rows."""
    unit = F.normalize(keys.float(), dim=-1) * valid[..., None]
    own = torch.arange(keys.shape[2], device=keys.device)
    total = torch.zeros(valid.shape, device=keys.device)
    for rows in own.split(BLOCK):
        alike = (unit[:, :, rows] @ unit.transpose(-1, -2)).masked_fill(own == rows[:, None], 0.0)
        latest = torch.where(alike > threshold, own, -1).amax(-1, keepdim=True)
        total = total + alike.masked_fill(own == latest, 0.0).sum(2)
    return total / valid.sum(-1, keepdim=True).clamp(min=1)
