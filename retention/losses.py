"""Token losses and the capacity hinge; every term is a (total, count) pair, so batches add up exactly."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens vocab"]]
Pair = tuple[Float[Tensor, ""], Float[Tensor, ""]]
IGNORE = -100


def distillation_terms(
    student: Float[Tensor, "batch tokens hidden"],
    teacher: Float[Tensor, "batch tokens hidden"],
    labels: Int[Tensor, "batch tokens"],
    head: Head,
    *,
    chunk: int = 1024,
) -> tuple[Pair, Pair]:
    """Forward KL to the teacher and next-token cross-entropy, from final hidden states through the frozen head.

    Both count exactly the positions whose next label is scored (arXiv 2512.03324, eq. 8 and 9; the public code
    leaves the KL mask unshifted). Logits exist for `chunk` positions at a time, in the backward too; log-sum-exp
    in fp32.
    """
    scored = labels[:, 1:] != IGNORE
    target, own, other = labels[:, 1:][scored], student[:, :-1][scored], teacher[:, :-1][scored].detach()
    kl = ntp = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(target), chunk):
        part = slice(start, start + chunk)
        chunk_kl, chunk_ntp = checkpoint(_token_sums, own[part], other[part], target[part], head, use_reentrant=False)
        kl, ntp = kl + chunk_kl, ntp + chunk_ntp
    count = kl.new_tensor(float(len(target)))
    return (kl, count), (ntp, count)


def _token_sums(own: Tensor, other: Tensor, target: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    log_student = head(own).float().log_softmax(-1)
    log_teacher = head(other).float().log_softmax(-1).detach()
    kl = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return kl, F.nll_loss(log_student, target, reduction="sum")


def hidden_distance(
    student: Float[Tensor, "batch tokens hidden"],
    teacher: Float[Tensor, "batch tokens hidden"],
    labels: Int[Tensor, "batch tokens"],
) -> Pair:
    """Squared distance of final hidden states, meaned over features, at the positions whose next label is scored."""
    scored = labels[:, 1:] != IGNORE
    apart = student[:, :-1][scored].float() - teacher[:, :-1][scored].detach().float()
    return torch.square(apart).mean(-1).sum(), scored.sum().float()


def relative_excess(
    sizes: Float[Tensor, "layers batch kv_heads queries"],
    queries: Int[Tensor, "batch queries"],
    budget: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """How far the expected cache size, meaned over layers and heads, lies above the budget, in budgets.

    Signed, meaned over the eligible queries (those past the budget) of all sequences, without a gradient; 0 where there
    are none.
    """
    limit = budget[:, None]
    eligible = queries.float() >= limit
    excess = ((sizes.detach().mean((0, 2)) - limit) / limit).masked_fill(~eligible, 0.0)
    return excess.sum() / eligible.sum().clamp(min=1)


def capacity_loss(
    sizes: Float[Tensor, "layers batch kv_heads queries"],
    queries: Int[Tensor, "batch queries"],
    budget: Float[Tensor, " batch"],
    *,
    scope: str = "global",
    norm: str = "exact",
    reduction: str = "mean",
) -> Pair:
    """Hinge on expected cache size above the budget, meaned over eligible queries (those past the budget).

    `scope: local` holds every head to the budget (arXiv 2512.03324), `global` only their mean (arXiv 2605.09649).
    `norm: exact` divides by `t + 1 - M`: in [0, 1], and 1 when nothing is forgotten; `public` by
    `max(1, t - M)` per head as the public code does; `budget` by M, which weighs long contexts more; `paper` by
    t + 1 as the paper writes it. `reduction: active_mean` divides a sequence's sum by the number of its violations,
    without a gradient, as the public code does: about as strong for the last violation as for all of them.
    Sequences not longer than their budget contribute (0, 0).
    """
    t, limit = queries.float(), budget[:, None]
    eligible = t >= limit
    if scope == "global":
        sizes = sizes.mean((0, 2), keepdim=True)
    public = (t - limit).clamp(min=1)
    scales = {"exact": t + 1 - limit, "public": public, "budget": limit.expand_as(t), "paper": t + 1}
    scale = scales[norm].clamp(min=1e-6)
    excess = (sizes - limit[None, :, None]).clamp(min=0) / scale[None, :, None] * eligible[None, :, None]
    counted = eligible.sum(-1) * sizes.shape[0] * sizes.shape[2]
    if reduction == "active_mean":
        counted = (excess.detach() > 0).sum((0, 2, 3))
    per_row = excess.sum((0, 2, 3)) / counted.clamp(min=1)
    return per_row.sum(), eligible.any(-1).float().sum()
