"""How evicted entries reach a memory, and how queries read it back: the glue between a layer and its memory."""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.memory import Evicted, MemoryLayer, State, wide
from retention.ops.entropy import observed_by, observers_of
from retention.ops.logits import capped
from retention.ops.observe import attention_rows
from retention.types import KVState

if TYPE_CHECKING:
    from retention.policies import Policy


def watched(
    state: KVState, entropy: str | None
) -> tuple[Float[Tensor, "batch kv_heads keys"], Float[Tensor, "batch kv_heads keys"]]:
    """Entropy of some kind and attention received, both in [0, 1]; 0 where no rows were collected or none are read."""
    rows = None if entropy is None else state.statistics.get(observers_of(entropy))
    if entropy is None or rows is None:
        zero = torch.zeros(state.valid.shape, device=state.valid.device)
        return zero, zero
    return observed_by(rows, state.visual, state.valid, entropy)


def absorb(
    memory: MemoryLayer,
    state: State,
    kv: KVState,
    kept: Bool[Tensor, "batch kv_heads keys"],
    policy: "Policy",
    scaling: float,
    places: Int[Tensor, "batch kv_heads keys 4"] | None = None,
) -> State:
    """The memory's state after everything but `kept` left; padding never joins."""
    entropy, attention = watched(kv, memory.entropy)
    leaving = kv.valid & ~kept
    state = state or memory.empty(kv.valid.shape[0], kv.valid.device)
    if not leaving.any():
        return state
    scores = policy.score(kv).float()
    places = None if places is None else torch.where(kv.valid[..., None], places, -1)
    given = kv.keys, kv.values, leaving, kv.visual, scores, entropy, attention, scaling, places
    return memory.absorb(state, Evicted(*given))


@torch.no_grad()
def doubt_of(
    memory: MemoryLayer | None,
    query: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    visible: Bool[Tensor, "batch kv_heads queries keys"],
    visual: Bool[Tensor, "batch kv_heads keys"],
    scaling: float,
) -> Float[Tensor, "batch heads queries"] | None:
    """Entropy of each query over the visual tokens it sees, by the log of their number; 0 below two of them.

    None for a memory that does not read it. No gradient goes through it: that of an entropy is infinite at 0.
    """
    if memory is None or not memory.reads_doubt:
        return None
    seen = visible & visual[:, :, None]
    rows = attention_rows(query, keys, seen, scaling)
    count = seen.sum(-1)[:, :, None]
    entropy = torch.special.entr(rows).sum(-1) / count.clamp(min=2).to(rows.dtype).log()
    return rearrange(torch.where(count > 1, entropy, 0.0), "b h g q -> b (h g) q")


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
    logits = capped(scaling * wide(query) @ wide(keys).transpose(-1, -2), scaling).masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return (weights @ wide(values)).to(query.dtype), lse


def select_rows(state: State, rows: Tensor) -> State:
    """The given batch rows of a state."""
    return {name: x[rows] for name, x in state.items()}
