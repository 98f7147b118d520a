"""Images of a prompt as frames: which patch lies where, how alike frames are at a place, averages over neighbours."""

from math import isqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

Entries = Float[Tensor, "batch kv_heads keys width"]
Scores = Float[Tensor, "batch kv_heads keys"]
Held = Bool[Tensor, "batch kv_heads keys"]
Numbers = Int[Tensor, "batch kv_heads keys"]


def frame_table(visual: Bool[Tensor, "batch positions"]) -> Int[Tensor, "3 batch positions"]:
    """Frame, place inside it and its number of places, by sequence position; -1, 0 and 0 where there is no image.

    A frame is a run of visual positions; images without anything between them are one.
    """
    starts = visual & ~F.pad(visual, (1, 0))[:, :-1]
    frame = torch.where(visual, starts.long().cumsum(1) - 1, -1)
    steps = torch.arange(visual.shape[1], device=visual.device).expand(visual.shape)
    first = torch.where(starts, steps, 0).cummax(1).values if visual.shape[1] else steps
    sizes = torch.zeros(len(visual), visual.shape[1] + 1, dtype=torch.long, device=visual.device)
    sizes = sizes.scatter_add(1, frame % (visual.shape[1] + 1), visual.long())
    size = sizes.gather(1, frame.clamp(min=0))
    return torch.stack([frame, torch.where(visual, steps - first, 0), torch.where(visual, size, 0)])


def naive_likeness(keys: Entries, held: Held, frame: Numbers, place: Numbers, size: Numbers, recent: Held) -> Scores:
    """Mean cosine of each held key with those of the recent frames of its size at its place; 0 where none is held."""
    found = torch.zeros(held.shape)
    for row, head in torch.ones(held.shape[:2]).nonzero().tolist():
        own = [x[row, head] for x in (held, place, size, recent)]
        for j in own[0].nonzero().flatten().tolist():
            same = own[0] & own[3] & (own[1] == own[1][j]) & (own[2] == own[2][j]) & (frame[row, head] >= 0)
            if same.any():
                here = keys[row, head, j].float()[None]
                found[row, head, j] = F.cosine_similarity(here, keys[row, head, same].float(), dim=-1).mean()
    return found


def likeness(keys: Entries, held: Held, frame: Numbers, place: Numbers, size: Numbers, recent: Held) -> Scores:
    """The same from the sum of unit keys at each place, added frame by frame."""
    unit, held = F.normalize(keys.float(), dim=-1), held & (frame >= 0)
    sizes = size.unique()
    slots = torch.searchsorted(sizes, size.contiguous()) * (int(size.max()) + 1) + place
    count = len(sizes) * (int(size.max()) + 1)
    total = torch.zeros(*held.shape[:2], count + 1, keys.shape[-1], device=keys.device)
    many = torch.zeros(*held.shape[:2], count + 1, device=keys.device)
    last = frame.masked_fill(~recent, -1).amax((1, 2), keepdim=True)
    least = torch.where(recent & held, frame, last).amin((1, 2), keepdim=True)
    for step in range(int((last - least).max()) + 1):
        # one frame at a time: no slot twice, so the order of addition is fixed
        own = torch.where(held & recent & (frame == least + step), slots, count)
        index = own[..., None].expand(unit.shape)
        total = total + torch.zeros_like(total).scatter(2, index, unit)
        many = many + torch.zeros_like(many).scatter(2, own, torch.ones(own.shape, device=keys.device))
    mean = total.gather(2, slots[..., None].expand(unit.shape)) / many.gather(2, slots).clamp(min=1)[..., None]
    return (unit * mean).sum(-1) * held


def naive_pooled(
    scores: Scores, held: Held, frame: Numbers, place: Numbers, size: Numbers, reach: tuple[int, int, int]
) -> Scores:
    """Mean of what is held within `reach` frames, rows and columns (kernels, odd) of each patch of an image.

    Frames of square size are square grids, others one row. Frames count as neighbours where all of a row of the batch
    have one size. Entries outside images stay as they are.
    """
    found = scores.float().clone()
    for row, head in torch.ones(held.shape[:2]).nonzero().tolist():
        own = held[row] & (frame[row] >= 0)
        several = int(size[row][own].unique().numel()) > 1
        here = own[head].nonzero().flatten().tolist()

        def cell(j: int, row: int = row, head: int = head, several: bool = several) -> tuple[int, int, int]:
            side = _side(int(size[row, head, j]), reach)
            apart = 10**6 if several else 1  # far from any other frame
            y, x = divmod(int(place[row, head, j]), side)
            return int(frame[row, head, j]) * apart, y, x

        for j in here:
            near = [
                i for i in here if all(abs(a - b) <= k // 2 for a, b, k in zip(cell(i), cell(j), reach, strict=True))
            ]
            found[row, head, j] = scores[row, head, near].float().mean()
    return found


def _side(size: int, reach: tuple[int, int, int]) -> int:
    """Columns of a frame: a square's, or all its places, also where only a line is pooled over."""
    return isqrt(size) if reach[1] > 1 and isqrt(size) ** 2 == size else size


def pooled(
    scores: Scores, held: Held, frame: Numbers, place: Numbers, size: Numbers, reach: tuple[int, int, int]
) -> Scores:
    """The same on grids, one size of frames at a time."""
    found, held = scores.float().clone(), held & (frame >= 0)
    for row, own in enumerate(held):
        sizes = size[row][own].unique().tolist()
        for places in sizes:
            mine = own & (size[row] == places)
            numbers = frame[row][mine]
            first, frames = int(numbers.min()), int(numbers.max() - numbers.min()) + 1
            side = _side(places, reach)
            slots = torch.where(mine, (frame[row] - first) * places + place[row], frames * places)
            kernel = (reach[0] if len(sizes) == 1 else 1, reach[1] if side < places else 1, reach[2])
            grids = []
            for values in (scores[row].float() * mine, mine.float()):
                table = torch.zeros(len(own), frames * places + 1, device=scores.device).scatter(1, slots, values)
                grids.append(table[:, :-1].view(-1, 1, frames, places // side, side))
            around = [k // 2 for k in reversed(kernel) for _ in range(2)]  # pooling itself refuses grids below a kernel
            total, count = (F.avg_pool3d(F.pad(x, around), kernel, stride=1) for x in grids)
            mean = F.pad((total / count.clamp(min=1e-9)).flatten(1), (0, 1)).gather(1, slots)
            found[row] = torch.where(mine, mean, found[row])
    return found
