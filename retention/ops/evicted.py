"""A simulated run of evictions, differentiable: which keys leave when, and attention that sees it.

Every key has one decision that counts: the eviction it leaves by, or the last one it survives. `kept` is that decision,
`since` the position of the first query behind it, `cut` the score that would just have stayed.
Sources: arXiv 2512.03324 (what is kept); the relaxation is a reconstruction, of the family of arXiv 2506.05345.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retention.ops import select
from retention.ops.attention import _in_blocks, _seen
from retention.ops.decay import age
from retention.ops.logits import capped

NEVER = 2**62
"""Position of the first query behind a decision that is never made."""


@dataclass
class Fate:
    """What becomes of every key."""

    since: Int[Tensor, "layers batch kv_heads tokens"]
    kept: Bool[Tensor, "layers batch kv_heads tokens"]
    cut: Float[Tensor, "layers batch kv_heads tokens"]


@torch.no_grad()
def fates(
    log_beta: Float[Tensor, "layers batch kv_heads tokens"],
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"],
    moments: Int[Tensor, "batch moments"],
    budget: Int[Tensor, " batch"],
    *,
    pooled: bool,
) -> Fate:
    """Evict whenever a row has seen as many tokens as `moments` say (0: not at all), each time down to `budget`.

    The order is that of `(seen - position) * log_beta`, ties and all as in a cache: in one pool of layers and heads, or
    head by head. What left never returns. `cut` lies half-way between the worst that stays and the best that leaves.
    """
    shape = log_beta.shape
    where, alive = positions[None, :, None].expand(shape), valid[None, :, None].expand(shape)
    since, cut = torch.full(shape, NEVER, device=log_beta.device), torch.zeros_like(log_beta, dtype=torch.float)
    kept, nobody = torch.ones_like(alive), torch.zeros_like(alive)
    totals = budget * shape[0] * shape[2]
    counts = budget[None, :, None].expand(shape[:3])
    over = (0, 2, 3) if pooled else (3,)
    for seen in moments.unbind(1):
        now = seen[None, :, None, None]
        asked = alive & kept & (where < now)
        scores = (now - where) * log_beta.float()
        ranking = select.Ranking(scores, where, asked, nobody)
        stays = select.keep_global(ranking, totals) if pooled else select.keep_per_head(ranking, counts)
        worst = scores.masked_fill(~stays, torch.inf).amin(over, keepdim=True)
        best = scores.masked_fill(stays | ~asked, -torch.inf).amax(over, keepdim=True)
        limit = torch.where(torch.isfinite(best), (worst + best) / 2, -torch.inf)
        since, cut = torch.where(asked, now, since), torch.where(asked, limit, cut)
        kept = kept & (stays | ~asked)
    return Fate(since, kept, cut)


def hard_weights(kept: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Log weights of keys that are there or not."""
    return torch.zeros(kept.shape, device=kept.device).masked_fill(~kept, -torch.inf)


def soft_weights(
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    positions: Int[Tensor, "batch tokens"],
    since: Int[Tensor, "batch kv_heads tokens"],
    cut: Float[Tensor, "batch kv_heads tokens"],
    temperature: float,
) -> Float[Tensor, "batch kv_heads tokens"]:
    """The same relaxed: `logsigmoid((log_alpha - cut) / temperature)`, 0 for keys that nothing decides about.

    Tends to the hard weights as the temperature falls. Differs from thresholds at the worst key kept, which would leave
    that one at a half.
    """
    free = (since == NEVER) | torch.isinf(cut)
    ages = (since - positions[:, None]).masked_fill(free, 0)
    margin = ages * log_beta.float() - cut.masked_fill(free, 0.0)
    return F.logsigmoid(margin / temperature).masked_fill(free, 0.0)


def naive_evicted_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_keep: Float[Tensor, "batch kv_heads tokens"],
    since: Int[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
    first: int = 0,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention with `log_keep` of a key added to its logits for queries from position `since` of the key on.

    `allowed` and `first` as for gated attention. Rows of padded queries are undefined.
    """
    groups, rows = q.shape[1] // k.shape[1], slice(first, first + q.shape[2])
    ahead = age(positions[:, None, rows].expand(-1, k.shape[1], -1), since) >= 0
    bias = torch.where(ahead, log_keep[:, :, None], 0.0).repeat_interleave(groups, 1)
    k, v = (x.repeat_interleave(groups, 1).float() for x in (k, v))
    logits = capped(scaling * q.float() @ k.transpose(-1, -2), scaling) + bias
    weights = logits.masked_fill(~_seen(k.shape[2], rows, valid, allowed, q.device), float("-inf")).softmax(-1)
    return (weights @ v).to(q.dtype)


def evicted_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_keep: Float[Tensor, "batch kv_heads tokens"],
    since: Int[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same in blocks of queries, computed again in the backward: no tokens x tokens map is kept."""

    def block(rows: Tensor, first: int) -> Tensor:
        more: dict[str, Any] = {"positions": positions, "valid": valid, "allowed": allowed, "first": first}
        return naive_evicted_attention(rows, k, v, log_keep, since, scaling=scaling, **more)

    return _in_blocks(block, q)
