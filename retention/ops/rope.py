"""Re-rotate cached keys: what moves kept entries to contiguous positions (`positions: packed`).

A coordinate is what a rotary embedding turns by: one axis for text models, three (time, height, width) for
M-RoPE. Keys are in the half-split layout of Llama and its descendants.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def angles(
    coordinates: Int[Tensor, " axes *entries"],
    inv_freq: Float[Tensor, "*#entries frequencies"],
    axis: Int[Tensor, " frequencies"],
) -> Float[Tensor, "*entries frequencies"]:
    """Angle in radians of each frequency: the coordinate on that frequency's axis times the frequency, fp64.

    The product is rounded to fp32 first, as transformers rounds it. Differences of two angles then lead from
    the key that the model wrote to the key that it would write, at any position, and errors never add up.
    `inv_freq` may differ between entries, for keys written under different frequencies (dynamic, longrope).
    """
    axis, inv_freq = axis.to(coordinates.device), inv_freq.to(coordinates.device)
    return (coordinates.movedim(0, -1)[..., axis].float() * inv_freq.float()).double()


def turn_keys(
    keys: Float[Tensor, "*batch keys head_dim"],
    angle_delta: Float[Tensor, "*batch keys frequencies"],
) -> Float[Tensor, "*batch keys head_dim"]:
    """Turn post-RoPE keys by `angle_delta` radians: the difference of `angles` at the new and the old place.

    Computed in fp32 with fp64 angles. Dimensions beyond twice the number of frequencies are not rotated
    (partial rotary); a key that was scaled when it was written (YaRN, longrope) stays scaled.
    """
    cos, sin = angle_delta.double().cos().float(), angle_delta.double().sin().float()
    half = angle_delta.shape[-1]
    x, y, rest = keys[..., :half].float(), keys[..., half : 2 * half].float(), keys[..., 2 * half :]
    turned = torch.cat([x * cos - y * sin, y * cos + x * sin], -1).to(keys.dtype)
    return torch.cat([turned, rest], -1)


def packed_coordinates(
    coordinates: Int[Tensor, "axes batch kv_heads keys"],
    keep: Bool[Tensor, "batch kv_heads keys"],
    next_position: Int[Tensor, " batch"],
) -> Int[Tensor, "axes batch kv_heads keys"]:
    """Coordinates after packing; entries that are not kept (whatever their coordinates) stay as they are.

    A kept entry spans the integers from its smallest to its largest coordinate. It moves on all axes by the
    number of integers between itself and `next_position`, where the next token goes, that no kept entry of
    its head spans: packing removes the empty stretches of the line of positions and nothing else.

    On one axis entry i of n goes to `next_position - n + i`. With M-RoPE an image keeps its inner geometry,
    for all its tokens span its start (their time), so no stretch inside it is ever empty; the frames of a
    Qwen2.5-VL clip share their spatial start and move together for the same reason, with the text that their
    times outrun. Positions as transformers gives them have no empty stretch, so keeping everything moves
    nothing. The move is monotone, never lengthens a distance, never lets kept entries meet, and packing
    twice is packing once. An entry that reaches `next_position` or beyond is not moved.
    """
    if not coordinates.shape[-1]:
        return coordinates
    end = next_position[:, None, None].expand(*keep.shape[:2], 1)
    first = torch.where(keep, coordinates.amin(0), end).minimum(end)  # nothing is empty behind what starts at the end
    last = torch.where(keep, coordinates.amax(0), end)
    first, order = first.sort(-1)
    reach = last.gather(-1, order).cummax(-1).values
    empty = (torch.cat([first[..., 1:], end], -1) - reach - 1).clamp(min=0)
    behind = empty.flip(-1).cumsum(-1).flip(-1)
    move = torch.zeros_like(behind).scatter(-1, order, behind)
    return coordinates + move.to(coordinates.dtype)


def naive_packed_coordinates(
    coordinates: Int[Tensor, "axes batch kv_heads keys"],
    keep: Bool[Tensor, "batch kv_heads keys"],
    next_position: Int[Tensor, " batch"],
) -> Int[Tensor, "axes batch kv_heads keys"]:
    """`packed_coordinates` by counting the empty integers one by one."""
    packed = coordinates.clone()
    for row, end in enumerate(next_position.tolist()):
        for head in range(keep.shape[1]):
            kept = [(i, coordinates[:, row, head, i].tolist()) for i in keep[row, head].nonzero().flatten().tolist()]
            spanned = {place for _, entry in kept for place in range(min(entry), max(entry) + 1)}
            for i, entry in kept:
                packed[:, row, head, i] += sum(place not in spanned for place in range(min(entry), end))
    return packed


def mean_turn(
    coordinate: Int[Tensor, " batch"], count: int, frequencies: Float[Tensor, " frequencies"], head_dim: int
) -> Float[Tensor, "batch head_dim head_dim"]:
    """Mean of the rotations to the `count` text positions from `coordinate` on, as one matrix for each row."""
    steps = (coordinate[:, None] + torch.arange(count, device=coordinate.device)).double()
    angle = steps[..., None] * frequencies.double()
    cos, sin = angle.cos().mean(1).float(), angle.sin().mean(1).float()
    half = len(frequencies)
    own = torch.arange(half, device=cos.device)
    turn = torch.eye(head_dim, device=cos.device).repeat(len(coordinate), 1, 1)
    turn[:, own, own], turn[:, own + half, own + half] = cos, cos
    turn[:, own, own + half], turn[:, own + half, own] = -sin, sin
    return turn
