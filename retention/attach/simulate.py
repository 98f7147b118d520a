"""One forward that behaves as if a context had been evicted before its questions came, differentiable in the memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retention.attach.capture import Capture, LayerCapture
from retention.attach.hooks import Attend, attached
from retention.attach.plain import AttentionCall
from retention.cache.config import CacheConfig
from retention.cache.decide import decide
from retention.cache.recall import attention_with_lse, doubt_of, watched
from retention.memory import Evicted, MemoryLayer, RetentionMemory
from retention.models.family import model_shape
from retention.ops.entropy import observer_rows, observers_of, observing_queries
from retention.policies import Policy
from retention.policies.collect import WINDOW
from retention.types import KVState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class SimulatedEviction:
    """A decision about the context of every row: what each head keeps of it when the first question comes."""

    kept: Bool[Tensor, "layers batch kv_heads tokens"]
    context: Bool[Tensor, "batch tokens"]
    """Real tokens before the eviction."""
    valid: Bool[Tensor, "batch tokens"]
    states: list[KVState]
    """What the policy saw, by layer."""
    scores: list[Float[Tensor, "batch kv_heads tokens"]]
    places: Int[Tensor, "batch tokens 4"] | None = None
    """Where patches lie in their images, if known."""

    @property
    def first(self) -> int:
        """The first column behind any row's context."""
        columns = torch.arange(self.context.shape[1], device=self.context.device)
        return int(torch.where(self.context, columns, -1).amax(1).min()) + 1

    def later(self) -> Bool[Tensor, "batch queries"]:
        """Which columns from `first` on come after their row's eviction."""
        return (self.valid & ~self.context)[:, self.first :]

    def visible(self, layer: int | None) -> Bool[Tensor, "batch kv_heads queries tokens"]:
        """What the queries from `first` on may see: everything before them, or with a layer what that layer holds."""
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        past = (columns <= columns[self.first :, None]) & self.valid[:, None]
        whole = past[:, None].expand(-1, self.kept.shape[2], -1, -1)
        held = self.context[:, None] & ~self.kept[0 if layer is None else layer]
        return whole if layer is None else whole & ~held[:, :, None]

    def evicted(
        self, memory: MemoryLayer, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float
    ) -> Evicted:
        """What leaves a layer, with entropy and attention as the last rows before the eviction saw it."""
        state, entropy, statistics = self.states[layer], memory.entropy, {}
        if entropy is not None:
            with torch.no_grad():
                statistics = {observers_of(entropy): self._observed(entropy, query, keys, state.visual[:, 0], scaling)}
        found = watched(replace(state, statistics=statistics), entropy)
        leaving = self.context[:, None] & ~self.kept[layer]
        places = None if self.places is None else self.places[:, None].expand(*leaving.shape, -1)
        return Evicted(keys, values, leaving, state.visual, self.scores[layer], *found, scaling, places)

    def _observed(
        self, entropy: str, query: Tensor, keys: Tensor, visual: Tensor, scaling: float
    ) -> Float[Tensor, "batch kv_heads rows groups tokens"]:
        """The newest rows before the eviction, as a collector would have them."""
        start = max(0, self.first - WINDOW)
        rows, columns = slice(start, self.first), torch.arange(self.first, device=keys.device)
        seen = (columns <= columns[rows, None]) & self.valid[:, rows, None] & self.valid[:, None, : self.first]
        seen = seen[:, None].expand(-1, keys.shape[1], -1, -1)
        observing = observing_queries(self.valid[:, rows], visual[:, rows], visual[:, :start].any(1))
        given = query[:, :, rows], keys[:, :, : self.first], seen, scaling, observing
        found = observer_rows(*given, by_head=entropy == "across_heads")
        return F.pad(found, (0, keys.shape[2] - self.first))


def decide_eviction(
    capture: Capture, context: Bool[Tensor, "batch tokens"], policy: Policy, share: float
) -> SimulatedEviction | None:
    """What a policy keeps of every row's context at a kept share; None where everything fits."""
    valid, visual, positions = capture.valid, capture.visual, capture.positions
    assert valid is not None
    assert visual is not None
    assert positions is not None
    seen, states = context.sum(1), []
    for number, layer in enumerate(capture.layers):
        shape = layer.key.shape[:3]
        where, real, seen_visual, nobody = (
            x[:, None].expand(shape) for x in (positions, context, visual & context, torch.zeros_like(context))
        )
        entries = partial(_entries, layer)
        states.append(KVState(entries, where, real, seen_visual, nobody, seen, layer.log_beta, layer=number))
    budgets = (share * seen).round().long().clamp(min=1)
    available = torch.stack([state.valid.sum(-1) for state in states])
    kept = decide(states, policy, CacheConfig(), budgets, available)
    if kept is None:
        return None
    scores = [policy.score(state).float() for state in states]
    return SimulatedEviction(kept, context, valid, states, scores, capture.places)


def _entries(layer: LayerCapture) -> tuple[Tensor, Tensor]:
    return layer.key, layer.value


def after_eviction(
    memory: MemoryLayer | None,
    eviction: SimulatedEviction,
    layer: int,
    query: Float[Tensor, "batch heads tokens head_dim"],
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    scaling: float,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Output and log-sum-exp of the queries from `eviction.first` on, with a memory of what left if there is one."""
    later, visible = query[:, :, eviction.first :], eviction.visible(layer)
    out, lse = attention_with_lse(later, keys, values, visible, scaling)
    if memory is None:
        return out, lse
    leaving = eviction.evicted(memory, layer, query, keys, values, scaling)
    state = memory.absorb(memory.empty(keys.shape[0], keys.device), leaving)
    doubt = doubt_of(memory, later, keys, visible, eviction.states[layer].visual, scaling)
    return memory.read(state, later, out, lse, scaling, doubt)


@contextmanager
def simulate_eviction(
    model: "PreTrainedModel", eviction: SimulatedEviction, memory: RetentionMemory | None
) -> Iterator[None]:
    """Inside, forwards of the same inputs run as if evicted; on exit the model is exactly as before."""
    numbers: dict[int, int] = {layer: i for i, layer in enumerate(model_shape(model).layers)}

    def before_layer(layer: int, kwargs: dict[str, Any]) -> Attend:
        own = None if memory is None else memory.layer(numbers[layer])

        def attend(call: AttentionCall) -> Tensor:
            """The model's own attention, but queries behind the eviction see what is left."""
            out, heads = call.plain(), (call.query, call.key, call.value)
            later, _ = after_eviction(own, eviction, numbers[layer], *heads, call.scaling)
            return torch.cat([out[:, : out.shape[1] - later.shape[2]], later.transpose(1, 2)], 1)

        return attend

    with attached(model, tuple(numbers), before_layer):
        yield
