"""Attention probabilities recomputed for few queries, or summed over all in blocks; never all at once."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.blocks import BLOCK
from retention.ops.logits import grouped_logits


def attention_rows(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
) -> Float[Tensor, "batch kv_heads groups queries keys"]:
    """Softmax rows in fp32 over all visible keys, per query head; rows that see nothing are 0."""
    logits = grouped_logits(queries, keys, scaling)
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


def text_queries(
    valid: Bool[Tensor, "batch queries"],
    visual: Bool[Tensor, "batch queries"],
    seen_visual: Bool[Tensor, " batch"],
    fallback: int,
) -> Bool[Tensor, "batch queries"]:
    """Queries of text behind visual tokens; the newest `fallback` tokens where no text follows the last visual one.

    `seen_visual`: visual tokens came before these queries already.
    """
    text = valid & ~visual & (seen_visual[:, None] | (visual.cumsum(1) > 0))
    follows = text & (visual.flip(1).cumsum(1).flip(1) == 0)
    newest = valid & (valid.flip(1).cumsum(1).flip(1) <= fallback)
    return torch.where(follows.any(1, keepdim=True), text, newest)


TextAttention = tuple[
    Float[Tensor, "batch kv_heads keys"], Float[Tensor, "batch kv_heads keys"], Float[Tensor, "batch kv_heads keys"]
]


def naive_text_attention(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
    rows: Bool[Tensor, "batch queries"],
    visual: Bool[Tensor, "batch queries"],
) -> TextAttention:
    """What each key receives from `rows`: the plain sum, the sum weighted by u, and how many of them see it.

    `u_i` is the attention that row i itself receives from the rows that see it, divided by their number, averaged
    over all heads and scaled to mean 1 (arXiv 2606.03075; mean 1 and not sum 1, so that forwards add up row by row).
    The queries are the newest keys. A visual row does not count for its own key.
    """
    offset, own = keys.shape[2] - queries.shape[2], torch.arange(queries.shape[2], device=keys.device)
    attention = attention_rows(queries, keys, visible, scaling).mean(2) * rows[:, None, :, None]
    received = attention.mean(1).sum(1)[:, offset:]
    heard = _heard(received, rows)
    counted = visible & rows[:, None, :, None]
    attention[:, :, own, own + offset] *= ~visual[:, None]
    counted[:, :, own, own + offset] &= ~visual[:, None]
    weighted = (attention * heard[:, None, :, None]).sum(2)
    return attention.sum(2), weighted, counted.sum(2).to(weighted.dtype)


def _heard(
    received: Float[Tensor, "batch queries"], rows: Bool[Tensor, "batch queries"]
) -> Float[Tensor, "batch queries"]:
    """u: what each row receives, by the number of rows from itself on, scaled to mean 1; 0 elsewhere."""
    u = received * rows / rows.flip(1).cumsum(1).flip(1).clamp(min=1)
    return u * rows.sum(1, keepdim=True) / u.sum(1, keepdim=True).clamp(min=1e-20)


def text_attention(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
    rows: Bool[Tensor, "batch queries"],
    visual: Bool[Tensor, "batch queries"],
) -> TextAttention:
    """The same in two passes over blocks of those rows alone."""
    offset = keys.shape[2] - queries.shape[2]
    blocks = torch.nonzero(rows.any(0)).flatten().split(BLOCK)

    def attention(own: Int[Tensor, " rows"]) -> Float[Tensor, "batch kv_heads rows keys"]:
        weights = attention_rows(queries[:, :, own], keys, visible[:, :, own], scaling).mean(2)
        return weights * rows[:, None, own, None]

    received = torch.zeros(keys.shape[0], keys.shape[2], device=keys.device)
    for own in blocks:
        received = received + attention(own).mean(1).sum(1)
    heard = _heard(received[:, offset:], rows)
    plain, weighted, counts = (torch.zeros(keys.shape[:3], device=keys.device) for _ in range(3))
    for own in blocks:
        weights, steps = attention(own), torch.arange(len(own), device=keys.device)
        counted = visible[:, :, own] & rows[:, None, own, None]
        weights[:, :, steps, own + offset] *= ~visual[:, None, own]
        counted[:, :, steps, own + offset] &= ~visual[:, None, own]
        plain = plain + weights.sum(2)
        weighted = weighted + (weights * heard[:, None, own, None]).sum(2)
        counts = counts + counted.sum(2)
    return plain, weighted, counts


def peak_rows(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
    window: int,
) -> Float[Tensor, "batch kv_heads rows keys"]:
    """Rows of the last `window` queries: the softmax of the largest logit in each head's query group."""
    logits = grouped_logits(queries[:, :, -window:], keys, scaling).amax(2)
    return logits.masked_fill(~visible[:, :, -window:], float("-inf")).softmax(-1).nan_to_num(0.0)


def expected_logits(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    real: Bool[Tensor, "batch queries"],
    turn: Float[Tensor, "batch head_dim head_dim"],
    scaling: float,
) -> tuple[Float[Tensor, "batch kv_heads groups keys"], Float[Tensor, "batch kv_heads groups keys"]]:
    """Mean and half the variance of the logits of queries that scatter as `real` ones do and are then turned.

    Queries before their rotation, keys behind it; `turn` is the mean rotation of what is to come.
    """
    x = rearrange(queries, "b (h g) q d -> b h g q d", h=keys.shape[1]).float()
    weight = (real / real.sum(1, keepdim=True).clamp(min=1)).float()[:, None, None, :, None]
    mean = (weight * x).sum(3, keepdim=True)
    spread = (x - mean).transpose(-1, -2) @ (weight * (x - mean))
    turn = turn.float()[:, None, None]
    wide = keys.float()[:, :, None]
    centre = (wide * (mean @ turn.transpose(-1, -2))).sum(-1)
    variance = ((wide @ (turn @ spread @ turn.transpose(-1, -2))) * wide).sum(-1)
    return scaling * centre, 0.5 * scaling**2 * variance


def text_density(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
    rows: Bool[Tensor, "batch queries"],
    least: float,
) -> tuple[Float[Tensor, "batch kv_heads keys"], Float[Tensor, "batch kv_heads keys"]]:
    """How often each key gets at least `least` of the largest weight in one of `rows`, and how many of them see it."""
    dense, seen = (torch.zeros(keys.shape[:3], device=keys.device) for _ in range(2))
    for own in torch.nonzero(rows.any(0)).flatten().split(BLOCK):
        counted = visible[:, :, own] & rows[:, None, own, None]
        weights = attention_rows(queries[:, :, own], keys, visible[:, :, own], scaling)
        large = (weights >= least * weights.amax(-1, keepdim=True)) & counted[:, :, None]
        dense = dense + large.float().mean(2).sum(2)
        seen = seen + counted.sum(2)
    return dense, seen


def modality_entropy(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
    looking: Bool[Tensor, "batch queries"],
    looked_at: Bool[Tensor, "batch kv_heads keys"],
) -> Float[Tensor, "batch kv_heads keys"]:
    """Each key's part `-p log p` of the entropies of the rows of the other modality, softmax over their other keys alone.

    True is vision; summed over rows in blocks, averaged over the query group.
    """
    total = torch.zeros(keys.shape[:3], device=keys.device)
    for start in range(0, queries.shape[2], BLOCK):
        rows = slice(start, start + BLOCK)
        across = visible[:, :, rows] & (looking[:, None, rows, None] != looked_at[:, :, None])
        total = total + torch.special.entr(attention_rows(queries[:, :, rows], keys, across, scaling)).mean(2).sum(2)
    return total
