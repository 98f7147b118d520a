"""Steps that several policies' scores share."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def pool_along_entries(
    scores: Float[Tensor, "batch kv_heads keys"], valid: Bool[Tensor, "batch kv_heads keys"], kernel_size: int
) -> Float[Tensor, "batch kv_heads keys"]:
    """Average over each entry's neighbours, odd kernel, same length; holes and padding are left out and closed up."""
    order = (~valid).long().argsort(dim=-1, stable=True)
    near = [x.float().gather(-1, order) for x in (scores * valid, valid)]
    total, count = (F.avg_pool1d(x, kernel_size, stride=1, padding=kernel_size // 2) for x in near)
    pooled = total / count.clamp(min=1 / kernel_size)
    return torch.zeros_like(pooled).scatter(-1, order, pooled)
