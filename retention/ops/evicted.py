"""A simulated run of evictions, differentiable: which keys leave when, and with what weights attention sees it.

Every key has one decision that counts: the eviction it leaves by, or the last one it survives. `kept` is that decision,
`since` the position of the first query behind it, `cut` the score that would just have stayed.
Sources: arXiv 2512.03324 (what is kept); the relaxation is a reconstruction, of the family of arXiv 2506.05345.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retention.ops import select

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
