"""Uniform noise: what protection alone achieves, the floor of every table."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class Random(Policy):
    """`score = U(0, 1)`, a hash of (seed, layer, head, position): the same however the context is chunked or batched."""

    seed: int = 0
    """Changes the draw."""

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Hash noise in [0, 1)."""
        heads = torch.arange(kv.positions.shape[1], device=kv.positions.device)[None, :, None]
        mixed = kv.positions.long()
        for part in (heads, torch.full_like(heads, kv.layer), torch.full_like(heads, self.seed)):
            mixed = _mix(mixed + 0x9E3779B9 * (part.long() + 1))
        return (mixed & 0xFFFFFF).float() / 2**24


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A 32-bit integer finaliser, computed in int64."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)
