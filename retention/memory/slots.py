"""A few residual entries per head: evicted tokens join the nearest slot, which counts them. Needs no training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from retention.memory.base import Evicted, MemoryConfig, MemoryLayer, State
from retention.types import ModelShape


@dataclass
class Slots(MemoryConfig):
    """Slot j holds a mean key, a mean value and a count, attended to with `log count` added to its logit.

    Same family as ResKV (arXiv 2607.29591). Exact where the keys of a slot coincide.
    """

    name = "slots"

    slots: int = 16
    """Slots per KV head: `slots x (2 head_dim + 2)` numbers in fp32."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"expected memory.slots of at least 1, got {self.slots}")

    def build(self, shape: ModelShape) -> "SlotsLayer":
        """A layer without parameters."""
        return SlotsLayer(self.slots, shape.num_kv_heads, shape.head_dim)


class SlotsLayer(MemoryLayer):
    """Slots of one layer."""

    def __init__(self, slots: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.slots, self.kv_heads, self.head_dim = slots, kv_heads, head_dim

    def empty(self, batch: int, device: torch.device) -> State:
        """Zeros; a count of 0 is an empty slot."""
        shape = (batch, self.kv_heads, self.slots)
        sizes = {"keys": (*shape, self.head_dim), "values": (*shape, self.head_dim), "count": shape, "visual": shape}
        return {name: torch.zeros(size, device=device) for name, size in sizes.items()}

    def absorb(self, state: State, evicted: Evicted) -> State:
        """The evicted tokens of highest score fill what is empty; the others join the slot of nearest key.

        Nearest by cosine among slots of the same modality, or among all where the modality has none.
        """
        state = self._fill(state, evicted)
        rest = evicted.mask & ~state.pop("taken").bool()
        near = F.normalize(evicted.keys.float(), dim=-1) @ F.normalize(state["keys"], dim=-1).transpose(-1, -2)
        used = (state["count"] > 0)[:, :, None]
        alike = used & (evicted.visual[..., None] == state["visual"].bool()[:, :, None])
        near = near.masked_fill(~torch.where(alike.any(-1, keepdim=True), alike, used), float("-inf"))
        member = F.one_hot(near.argmax(-1), self.slots).float() * rest[..., None]
        added = member.sum(-2)
        count = state["count"] + added
        share = 1 / count.clamp(min=1)[..., None]

        def moved(mean: Tensor, new: Tensor) -> Tensor:
            return mean + (member.transpose(-1, -2) @ new.float() - added[..., None] * mean) * share

        keys, values = moved(state["keys"], evicted.keys), moved(state["values"], evicted.values)
        return {"keys": keys, "values": values, "count": count, "visual": state["visual"]}

    def _fill(self, state: State, evicted: Evicted) -> State:
        """Empty slots seeded by the best of the evicted, one each."""
        free = state["count"] == 0
        ranked = evicted.scores.float().masked_fill(~evicted.mask, float("-inf"))
        width = min(self.slots, ranked.shape[-1])
        best = ranked.topk(width, -1).indices
        there = evicted.mask.gather(-1, best)
        order = free.long().argsort(dim=-1, descending=True, stable=True)[..., :width]
        use = there & free.gather(-1, order)

        def put(old: Tensor, new: Tensor) -> Tensor:
            wide = new.dim() == 4
            at, src = (x[..., None].expand(-1, -1, -1, new.shape[-1]) if wide else x for x in (order, best))
            chosen = torch.where(use[..., None] if wide else use, new.float().gather(2, src), old.gather(2, at))
            return old.scatter(2, at, chosen)

        ones = torch.ones_like(evicted.scores)
        filled = {
            "keys": put(state["keys"], evicted.keys),
            "values": put(state["values"], evicted.values),
            "count": put(state["count"], ones),
            "visual": put(state["visual"], evicted.visual),
        }
        return filled | {"taken": torch.zeros_like(evicted.scores).scatter(-1, best, use.float())}

    def estimate(
        self, state: State, query: Float[Tensor, "batch kv_heads queries head_dim"], scaling: float
    ) -> tuple[Float[Tensor, "batch kv_heads queries value_dim"], Float[Tensor, "batch kv_heads queries"]]:
        """Softmax over the slots, each standing for as many keys as it counts."""
        logits = scaling * query @ state["keys"].transpose(-1, -2) + state["count"].log()[:, :, None]
        lse = logits.logsumexp(-1)
        weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
        return weights @ state["values"], lse
