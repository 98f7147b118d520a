"""The most a key receives from later queries, in logits or log probabilities: what cheap objectives regress on."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.blocks import BLOCK
from retention.ops.logits import grouped_logits


def naive_largest_received(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    asking: Bool[Tensor, "batch queries"],
    valid: Bool[Tensor, "batch keys"],
    scaling: float,
    *,
    normalise: bool = True,
    key_term: Float[Tensor, "batch heads keys"] | None = None,
    query_term: Float[Tensor, "batch queries"] | None = None,
    columns: Int[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "batch kv_heads keys"]:
    """Largest value over the query group and the asking queries behind each key, fp32; -inf where none is behind.

    A value is the log of the full causal softmax (`normalise`) or the logit `scaling * q . k`, plus a term of the
    key in its query head and one of the query. `columns`: where each query stands among the keys; by default
    queries and keys are the same tokens. A query's own key takes part in the softmax, not in the maximum.
    """
    if columns is None:
        columns = torch.arange(queries.shape[2], device=queries.device).expand(asking.shape)
    values = grouped_logits(queries, keys, scaling)
    ahead = columns[:, :, None] - torch.arange(keys.shape[2], device=keys.device)
    if normalise:
        visible = ((ahead >= 0) & valid[:, None]) | (ahead == 0)
        values = values.masked_fill(~visible[:, None, None], float("-inf")).log_softmax(-1)
    if key_term is not None:
        values = values + rearrange(key_term, "b (h g) k -> b h g 1 k", h=keys.shape[1])
    if query_term is not None:
        values = values + query_term[:, None, None, :, None]
    counts = asking[:, :, None] & (ahead > 0) & valid[:, None]
    return values.masked_fill(~counts[:, None, None], float("-inf")).amax((2, 3))


def largest_received(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    asking: Bool[Tensor, "batch queries"],
    valid: Bool[Tensor, "batch keys"],
    scaling: float,
    *,
    normalise: bool = True,
    key_term: Float[Tensor, "batch heads keys"] | None = None,
    query_term: Float[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "batch kv_heads keys"]:
    """The same for the asking queries alone, in blocks of them: memory linear in the number of keys."""
    best = torch.full(keys.shape[:3], float("-inf"), device=keys.device)
    most = int(asking.sum(1).max())
    columns = asking.long().argsort(dim=1, descending=True, stable=True)[:, :most]
    for start in range(0, most, BLOCK):
        chosen = columns[:, start : start + BLOCK]
        rows = queries.gather(2, chosen[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
        found = naive_largest_received(
            rows,
            keys,
            asking.gather(1, chosen),
            valid,
            scaling,
            normalise=normalise,
            key_term=key_term,
            query_term=None if query_term is None else query_term.gather(1, chosen),
            columns=chosen,
        )
        best = torch.maximum(best, found)
    return best
