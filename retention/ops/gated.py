"""Picks the form of gated attention that fits a call: by device, dtype, mask and cap, or as asked."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.attention import augmented_gated_attention, blocked_gated_attention, naive_gated_attention
from retention.ops.flex import flex_gated_attention
from retention.ops.logits import softcap_of
from retention.ops.proof import proven
from retention.ops.split import split_fits, split_gated_attention

FORMS: dict[str, Callable[..., Tensor]] = {
    "naive": naive_gated_attention,
    "blocked": blocked_gated_attention,
    "augmented": augmented_gated_attention,
    "split": split_gated_attention,
    "flex": flex_gated_attention,
}
FUSED = ("augmented", "split", "flex")
"""Forms that are causal and know no cap."""


def form_for(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    scaling: float,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
) -> str:
    """The form that is fast and accurate here; `flex` is taken only where it is asked for.

    Tensors of several dtypes, as autocast makes them, are attended in fp32.
    """
    if allowed is not None or softcap_of(scaling) is not None:
        return "blocked"
    widths = q.shape[-1], v.shape[-1]
    fits = q.dtype == k.dtype == v.dtype and split_fits(q.dtype, q.device, *widths)
    return "split" if fits and proven(q.device, *widths) else "augmented"


def gated_attention(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch kv_heads tokens head_dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
    documents: Int[Tensor, "batch tokens"] | None = None,
    form: str | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """`naive_gated_attention` in the form that fits, or in the one that is named.

    `documents`: the number of the document that each token is of, one after the other in a row; none sees another.

    Raises:
        ValueError: for a form that is not known, or cannot do what is asked of it.
    """
    form = form or form_for(q, k, v, scaling=scaling, allowed=allowed)
    if form not in FORMS:
        raise ValueError(f"expected one of {', '.join(FORMS)} as a form of gated attention, got {form!r}")
    given: dict[str, Any] = {"scaling": scaling, "positions": positions, "valid": valid}
    if form not in FUSED:
        return FORMS[form](q, k, v, log_beta, **given, allowed=allowed, documents=documents)
    if allowed is not None or softcap_of(scaling) is not None:
        raise ValueError(f"expected causal attention without a cap for the form {form!r}; take 'blocked' or none")
    if form == "flex":
        return flex_gated_attention(q, k, v, log_beta, **given, documents=documents)
    if documents is not None:
        return _one_by_one(FORMS[form], (q, k, v, log_beta), documents, **given)
    return FORMS[form](q, k, v, log_beta, **given)


def _one_by_one(
    form: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    documents: Int[Tensor, "batch tokens"],
    *,
    scaling: float,
    positions: Int[Tensor, "batch tokens"],
    valid: Bool[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Every document attended alone, which spends nothing on pairs of two documents; waits for the device once."""
    rows = []
    for row, numbers in enumerate(documents.cpu()):
        parts, at = [], 0
        for length in numbers.unique_consecutive(return_counts=True)[1].tolist():
            own = slice(at, at + length)
            four = [x[row : row + 1, :, own] for x in tensors]
            real = None if valid is None else valid[row : row + 1, own]
            parts.append(form(*four, scaling=scaling, positions=positions[row : row + 1, own], valid=real))
            at += length
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)
