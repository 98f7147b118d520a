"""How widely a token is attended to: the entropies behind RetentiveKV's retention score (arXiv 2605.04075).

All three are reconstructions: of that paper only `-p log p` over text-to-vision attention is known, and no code.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retention.ops.observe import attention_rows
from retention.ops.scores import unit_range

ENTROPIES = ("across_queries", "across_heads", "pointwise")
OBSERVED, OBSERVED_HEADS = "observers", "observers_by_head"
"""Statistics that hold the observing rows: query heads averaged, or apart."""
OBSERVERS = 32
"""Newest rows that are read."""
NOTHING = 1e-30
"""Attention in total, at or below which a token counts as never attended to."""
SEEN = torch.finfo(torch.float32).tiny
"""Least weight of a visible key, so that rows tell what they could not see from what they ignored."""


def observers_of(entropy: str) -> str:
    """The statistic, and its collector, that an entropy is taken from."""
    return OBSERVED_HEADS if entropy == "across_heads" else OBSERVED


def observing_queries(
    valid: Bool[Tensor, "batch queries"], visual: Bool[Tensor, "batch queries"], seen_visual: Bool[Tensor, " batch"]
) -> Bool[Tensor, "batch queries"]:
    """Text behind the last visual token; all queries where fewer than two such rows are there to tell an entropy.

    `seen_visual`: visual tokens came before these queries already.
    """
    behind = seen_visual[:, None] | (visual.cumsum(1) > 0)
    text = valid & ~visual & behind & (visual.flip(1).cumsum(1).flip(1) == 0)
    return torch.where(text.sum(1, keepdim=True) > 1, text, valid)


def observer_rows(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
    observing: Bool[Tensor, "batch queries"],
    *,
    by_head: bool,
) -> Float[Tensor, "batch kv_heads queries groups keys"]:
    """Softmax rows of the queries, 0 where one does not observe; query heads are averaged unless `by_head`."""
    rows = attention_rows(queries, keys, visible, scaling).transpose(2, 3)
    rows = rows if by_head else rows.mean(3, keepdim=True)
    seen = visible & observing[:, None, :, None]
    return torch.where(seen[:, :, :, None], rows.clamp(min=SEEN), 0.0)


def naive_token_entropy(
    rows: Float[Tensor, "batch kv_heads rows groups keys"],
    visual: Bool[Tensor, "batch kv_heads keys"],
    valid: Bool[Tensor, "batch kv_heads keys"],
    kind: str,
) -> Float[Tensor, "batch kv_heads keys"]:
    """Entropy of each token, in [0, 1]; 0 where it is padding, got nothing, or one row (or head) alone could tell.

    - `across_queries`: of the token's attention over the rows that can see it, by the log of their number: high where
      many queries look a little, 0 where one query looks alone. The default: it measures what the paper motivates.
    - `across_heads`: the same over the query heads that share the entry, each by its mean over rows.
    - `pointwise`: `e * mean over rows of -p log p`, p among the visible keys of the token's own modality. Published in
      form. Not monotone in p: it peaks at 1/e, and below that it *grows* with attention, so for one row it ranks like
      attention itself, and "low attention, high entropy" cannot occur. Only averaging over rows separates the two.
    """
    found = torch.zeros(valid.shape, device=rows.device, dtype=rows.dtype)
    for b, h, i in torch.nonzero(valid).tolist():
        sees = [r for r in range(rows.shape[2]) if float(rows[b, h, r, 0, i]) > 0]
        mean = {r: rows[b, h, r].mean(0) for r in sees}
        if sum(float(mean[r][i]) for r in sees) <= NOTHING:
            continue
        same = visual[b, h] == visual[b, h, i]
        if kind == "pointwise":
            parts = [float(mean[r][i] / mean[r][same].sum()) for r in sees]
            found[b, h, i] = math.e * sum(-p * math.log(p) for p in parts if p > 0) / len(parts)
            continue
        by_head = [sum(float(rows[b, h, r, g, i]) for r in sees) for g in range(rows.shape[3])]
        parts = [float(mean[r][i]) for r in sees] if kind == "across_queries" else by_head
        if len(parts) > 1:
            shares = [p / sum(parts) for p in parts]
            found[b, h, i] = sum(-p * math.log(p) for p in shares if p > 0) / math.log(len(parts))
    return found.clamp(0, 1)


def token_entropy(
    rows: Float[Tensor, "batch kv_heads rows groups keys"],
    visual: Bool[Tensor, "batch kv_heads keys"],
    valid: Bool[Tensor, "batch kv_heads keys"],
    kind: str,
) -> Float[Tensor, "batch kv_heads keys"]:
    """The same for all tokens at once; `naive_token_entropy` says what each kind is, and warns of `pointwise`."""
    mean = rows.mean(3)
    received, seers = mean.sum(2), (mean > 0).sum(2)
    if kind == "pointwise":
        vision = visual[:, :, None]
        seen, read = ((mean * own).sum(-1, keepdim=True) for own in (vision, ~vision))
        share = mean / torch.where(vision, seen, read).clamp(min=SEEN)
        entropy = math.e * torch.special.entr(share).sum(2) / seers.clamp(min=1)
    else:
        parts = mean if kind == "across_queries" else rows.sum(2)
        count = seers if kind == "across_queries" else torch.full_like(seers, rows.shape[3])
        share = parts / parts.sum(2, keepdim=True).clamp(min=NOTHING)
        entropy = torch.special.entr(share).sum(2) / count.clamp(min=2).to(share.dtype).log()
        entropy = torch.where(count > 1, entropy, 0.0)
    return torch.where(valid & (received > NOTHING), entropy, 0.0).clamp(0, 1)


def observed_by(
    rows: Float[Tensor, "batch kv_heads rows groups keys"],
    visual: Bool[Tensor, "batch kv_heads keys"],
    valid: Bool[Tensor, "batch kv_heads keys"],
    kind: str,
) -> tuple[Float[Tensor, "batch kv_heads keys"], Float[Tensor, "batch kv_heads keys"]]:
    """Entropy, and attention received in total, scaled to [0, 1] in each head, from the newest OBSERVERS rows."""
    rows = rows[:, :, -OBSERVERS:]
    return token_entropy(rows, visual, valid, kind), unit_range(rows.mean(3).sum(2), valid)


def retention_score(
    entropy: Float[Tensor, "batch kv_heads keys"], attention: Float[Tensor, "batch kv_heads keys"], lam: float
) -> Float[Tensor, "batch kv_heads keys"]:
    """`R = lam * a + (1 - lam) * h` (arXiv 2605.04075, from its authors' own summary)."""
    return lam * attention + (1 - lam) * entropy
