"""Gate outputs that are about the token before the one they were read off, as DMS has them (arXiv 2506.05345)."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from retention.cache.storage import LayerStorage

OPEN = 0.0
"""`log_beta` of a token that nothing was read for yet: no gate gives it more."""


def shifted(
    log_beta: Float[Tensor, "batch kv_heads tokens"], valid: Bool[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch kv_heads 1"], Float[Tensor, "batch kv_heads tokens"]]:
    """What a forward's tokens say of the last token before it, and of each other; padding says nothing of anyone.

    The first is NaN in rows that are all padding.
    """
    tokens = valid.shape[1]
    columns = torch.arange(tokens, device=valid.device).masked_fill(~valid, tokens)
    following = columns.flip(1).cummin(1).values.flip(1)  # the first valid column from each on
    following = F.pad(following, (0, 1), value=tokens)[:, None].expand(-1, log_beta.shape[1], -1)
    first = F.pad(log_beta, (0, 1), value=float("nan")).gather(2, following[..., :1])
    return first, F.pad(log_beta, (0, 1), value=OPEN).gather(2, following[..., 1:])


def settle(store: LayerStorage, valid: Bool[Tensor, "batch columns"], said: Float[Tensor, "batch kv_heads 1"]) -> None:
    """Give each row's newest entry what was `said` of it, where it is still held; `valid` is of all columns so far."""
    if store.log_beta is None:
        return
    columns, tail = valid.shape[1], store.tail
    newest = torch.arange(columns, device=valid.device).masked_fill(~valid, -1).amax(1)[:, None, None]
    if tail:
        buffer = store.log_beta
        slot = newest - (columns - tail)
        there = (slot >= 0) & ~said.isnan()
        data = buffer.data.clone() if buffer.shared else buffer.data
        index = slot.clamp(min=0).expand_as(said)
        buffer.data = data.scatter_(2, index, torch.where(there, said, data.gather(2, index)))
        buffer.shared = False
    known = store.entries
    if known is not None and known.log_beta is not None and store.counts is not None:
        per_head = store.counts.flatten()
        position = (valid.sum(1)[:, None, None] - 1).expand_as(said).flatten().repeat_interleave(per_head)
        of_newest = said.flatten().repeat_interleave(per_head)
        chosen = (known.positions == position) & ~of_newest.isnan()
        store.entries = replace(known, log_beta=torch.where(chosen, of_newest, known.log_beta))
