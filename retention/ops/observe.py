"""Attention probabilities recomputed for few queries, or summed over all in blocks; never all at once."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 256


def attention_rows(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
) -> Float[Tensor, "batch kv_heads groups queries keys"]:
    """Softmax rows in fp32 over all visible keys, per query head; rows that see nothing are 0."""
    grouped = rearrange(queries, "b (h g) q d -> b h g q d", h=keys.shape[1]).float()
    logits = scaling * grouped @ keys.float().transpose(-1, -2)[:, :, None]
    return logits.masked_fill(~visible[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)


def window_rows(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
    window: int,
) -> Float[Tensor, "batch kv_heads rows keys"]:
    """Rows of the last `window` queries (fewer if there are fewer), averaged over each head's query group."""
    return attention_rows(queries[:, :, -window:], keys, visible[:, :, -window:], scaling).mean(2)


def naive_column_sums(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
) -> Float[Tensor, "batch kv_heads keys"]:
    """Attention each key receives, summed over queries, averaged over the query group."""
    return attention_rows(queries, keys, visible, scaling).mean(2).sum(2)


def column_sums(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
) -> Float[Tensor, "batch kv_heads keys"]:
    """The same in blocks of queries: memory linear in the number of keys."""
    total = torch.zeros(keys.shape[:3], device=keys.device)
    for start in range(0, queries.shape[2], BLOCK):
        rows = slice(start, start + BLOCK)
        total = total + naive_column_sums(queries[:, :, rows], keys, visible[:, :, rows], scaling)
    return total
