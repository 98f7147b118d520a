"""How evicted entries reach a memory, and how queries read it back: the glue between a layer and its memory."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retention.memory import Evicted, MemoryLayer, State
from retention.types import KVState

if TYPE_CHECKING:
    from retention.policies import Policy


def watched(state: KVState) -> tuple[Float[Tensor, "batch kv_heads keys"], Float[Tensor, "batch kv_heads keys"]]:
    """Entropy over the watching queries and attention received, both in [0, 1]; 0 where no rows were collected.

    The entropy of a token is that of its attention over the queries, `-sum_r pi log pi / log n` with
    `pi(r) = A[r, i] / sum A[:, i]` and n the rows that can see it.
    """
    rows = state.statistics.get("window_rows")
    if rows is None:
        zero = torch.zeros(state.valid.shape, device=state.valid.device)
        return zero, zero
    received = rows.sum(2)
    share = rows / received.clamp(min=1e-20)[:, :, None]
    seers = (rows > 0).sum(2)
    entropy = torch.special.entr(share).sum(2) / seers.clamp(min=2).float().log()
    low, high = received.amin(-1, keepdim=True), received.amax(-1, keepdim=True)
    return torch.where(seers > 1, entropy, 0.0).clamp(0, 1), (received - low) / (high - low).clamp(min=1e-20)


def absorb(
    memory: MemoryLayer,
    state: State,
    kv: KVState,
    kept: Bool[Tensor, "batch kv_heads keys"],
    policy: "Policy",
    scaling: float,
) -> State:
    """The memory's state after everything but `kept` left; padding never joins."""
    entropy, attention = watched(kv)
    leaving = kv.valid & ~kept
    state = state or memory.empty(kv.valid.shape[0], kv.valid.device)
    if not leaving.any():
        return state
    scores = policy.score(kv).float()
    return memory.absorb(state, Evicted(kv.keys, kv.values, leaving, kv.visual, scores, entropy, attention, scaling))


def attention_with_lse(
    query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    values: Float[Tensor, "batch kv_heads keys value_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    scaling: float,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention and its log-sum-exp, fp32, for the few queries of a later turn."""
    groups = query.shape[1] // keys.shape[1]
    keys, values, visible = (x.repeat_interleave(groups, 1) for x in (keys, values, visible))
    logits = (scaling * query.float() @ keys.float().transpose(-1, -2)).masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return (weights @ values.float()).to(query.dtype), lse


def select_rows(state: State, rows: Tensor) -> State:
    """The given batch rows of a state."""
    return {name: x[rows] for name, x in state.items()}
