"""Attention of one new token over a ragged store: full pages of every head in one batch, and a dense buffer.

Segments are (batch row, KV head) pairs; the query group of a head are its queries. This is the plain-torch form
and the truth for the kernel.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.logits import capped

PAGE = 32
"""Entries per page: the least at which the batched products run at memory speed on a CPU."""


def ragged_arange(starts: Int[Tensor, " segments"], lengths: Int[Tensor, " segments"]) -> Int[Tensor, " total"]:
    """`starts[s], starts[s] + 1, ...`, `lengths[s]` numbers of each segment, one segment after the other."""
    total = int(lengths.sum())
    first = torch.repeat_interleave(starts - lengths.cumsum(0) + lengths, lengths, output_size=total)
    return first + torch.arange(total, device=starts.device)


def ragged_attention(
    query: Float[Tensor, "batch heads 1 head_dim"],
    page_keys: Float[Tensor, "pages page head_dim"],
    page_values: Float[Tensor, "pages page value_dim"],
    owner: Int[Tensor, " pages"],
    keys: Float[Tensor, "batch kv_heads columns head_dim"],
    values: Float[Tensor, "batch kv_heads columns value_dim"],
    visible: Bool[Tensor, "batch kv_heads_or_1 columns"] | None,
    scaling: float,
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], Float[Tensor, "batch heads 1"]]:
    """Softmax attention over the pages a head owns and its visible buffer columns together, and its log-sum-exp.

    `owner` names the segment of each page, `row * kv_heads + head`. Statistics are fp32. A head that sees
    nothing gives 0, with a log-sum-exp of -inf.
    """
    batch, kv_heads = keys.shape[:2]
    segments, groups = batch * kv_heads, query.shape[1] // kv_heads
    grouped = query.reshape(segments, groups, -1).float() * scaling
    dense = capped(torch.bmm(grouped, keys.flatten(0, 1).float().transpose(1, 2)), scaling)
    if visible is not None:
        hidden = ~visible.expand(batch, kv_heads, -1).reshape(segments, 1, -1)
        dense = dense.masked_fill(hidden, float("-inf"))
    paged = capped(torch.bmm(grouped.index_select(0, owner), page_keys.float().transpose(1, 2)), scaling)
    largest = dense.amax(-1) if dense.shape[-1] else dense.new_full((segments, groups), float("-inf"))
    largest = largest.scatter_reduce(0, owner[:, None].expand(-1, groups), paged.amax(-1), "amax")
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    paged = (paged - shift.index_select(0, owner)[..., None]).exp_()
    dense = (dense - shift[..., None]).exp_()
    mass = dense.sum(-1).index_add_(0, owner, paged.sum(-1))
    out = torch.bmm(dense, values.flatten(0, 1).float())
    out = out.index_add_(0, owner, torch.bmm(paged, page_values.float()))
    out = out / mass.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    shape = (batch, query.shape[1], 1)
    return out.to(query.dtype).view(*shape, -1), (mass.log() + shift).view(shape)
