"""Re-rotate cached keys: what moves kept entries to contiguous positions (`positions: packed`)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate_keys(
    keys: Float[Tensor, "*batch keys head_dim"],
    delta: Int[Tensor, "*batch keys"],
    inv_freq: Float[Tensor, " frequencies"],
) -> Float[Tensor, "*batch keys head_dim"]:
    """Rotate post-RoPE keys by `delta` positions: a key written at p reads as written at p + delta.

    Half-split layout of Llama and its descendants, one-dimensional positions; dimensions beyond twice the
    number of frequencies are not rotated. Exact to fp32 rounding of the angle.
    """
    angle = delta.unsqueeze(-1).double() * inv_freq.double()
    cos, sin = angle.cos().float(), angle.sin().float()
    half = inv_freq.shape[0]
    x, y, rest = keys[..., :half].float(), keys[..., half : 2 * half].float(), keys[..., 2 * half :]
    turned = torch.cat([x * cos - y * sin, y * cos + x * sin], -1).to(keys.dtype)
    return torch.cat([turned, rest], -1)
