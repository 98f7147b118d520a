"""Attention in blocks of queries that are computed again in the backward, and which keys queries see."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 256
"""Queries at a time, here and wherever a map of queries and keys is not to be held as a whole."""


def seen(
    tokens: int,
    rows: slice,
    valid: Bool[Tensor, "batch tokens"] | None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None,
    device: torch.device,
    documents: Int[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "..."]:
    """Which keys some queries see: their past, or what is allowed; always themselves.

    Padding and other documents are excluded from the past; what is allowed says all of it.
    """
    columns = torch.arange(tokens, device=device)
    own = columns == columns[rows, None]
    if allowed is not None:
        return allowed[:, :, rows] | own
    past = columns <= columns[rows, None]
    if valid is not None:
        past = past & valid[:, None, None]
    if documents is not None:
        past = past & (documents[:, None, rows, None] == documents[:, None, None])
    return past | own


def in_blocks(
    block: Callable[[Float[Tensor, "..."], int], Float[Tensor, "..."]], q: Float[Tensor, "batch heads tokens head_dim"]
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """A function of some queries and the first one's number, over all of them; nothing of a block is kept."""
    starts = range(0, q.shape[2], BLOCK)
    return torch.cat([checkpoint(block, q[:, :, at : at + BLOCK], at, use_reentrant=False) for at in starts], 2)
