"""The interface of a memory of evicted tokens: a small state per layer and KV head that later queries read back.

RetentiveKV-style (arXiv 2605.04075), reconstructed: no public code exists, so nothing here reproduces that paper.
For one query, with kept entries R and evicted ones E, the full output is `(1 - mu) o_R + mu o_E`, where the
missing mass is `mu = sigmoid(lse_E - lse_R)`. A memory estimates `lse_E` and `o_E` from its state.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retention.types import ModelShape

State = dict[str, Tensor]
"""Tensors of one layer for a batch, first axis batch, second KV heads; fp32."""


@dataclass
class Evicted:
    """What leaves a layer at once, in ascending order of position; `mask` names those that really leave."""

    keys: Float[Tensor, "batch kv_heads entries head_dim"]
    values: Float[Tensor, "batch kv_heads entries value_dim"]
    mask: Bool[Tensor, "batch kv_heads entries"]
    visual: Bool[Tensor, "batch kv_heads entries"]
    scores: Float[Tensor, "batch kv_heads entries"]
    """The policy's, higher = would have stayed."""
    entropy: Float[Tensor, "batch kv_heads entries"]
    """How widely a token was attended to, in [0, 1]; 0 where nobody watched."""
    attention: Float[Tensor, "batch kv_heads entries"]
    """Attention received, scaled to [0, 1] per head; 0 where nobody watched."""
    scaling: float
    """Of the logits."""
    places: Int[Tensor, "batch kv_heads entries 4"] | None = None
    """Image, frame, row and column of patches, image -1 elsewhere; None where the model does not tell."""


@dataclass
class MemoryConfig(ABC):
    """Hyper-parameters of a memory; `build` makes the module of one layer."""

    name: ClassVar[str]
    trained: ClassVar[bool] = False

    @abstractmethod
    def build(self, shape: ModelShape) -> "MemoryLayer":
        """A fresh layer for a model of this shape."""

    @property
    def collectors(self) -> tuple[str, ...]:
        """What has to be observed of evicted tokens while they are held."""
        return ()

    @property
    def placed(self) -> bool:
        """Whether it matters where in their images patches lie."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the memory's name."""
        return {"name": self.name, **asdict(self)}


@dataclass
class NoMemory(MemoryConfig):
    """What is evicted is gone; training trains gates, not a memory."""

    name = "none"

    def build(self, shape: ModelShape) -> "MemoryLayer":
        """Refused: there is nothing to build."""
        raise ValueError("memory 'none' holds nothing; choose another memory, or on_evict=drop")


class MemoryLayer(nn.Module, ABC):
    """The memory of one decoder layer: shared parameters, no state of any sequence."""

    entropy: str | None = None
    """Which entropy of evicted tokens it reads; None is neither entropy nor attention."""
    reads_doubt: bool = False
    """Whether reading takes the entropy of each query over the visual tokens that are held."""

    @abstractmethod
    def empty(self, batch: int, device: torch.device) -> State:
        """The state before anything was evicted."""

    @abstractmethod
    def absorb(self, state: State, evicted: Evicted) -> State:
        """The state after some entries left; the given one is not changed."""

    @abstractmethod
    def estimate(
        self, state: State, query: Float[Tensor, "batch kv_heads queries head_dim"], scaling: float
    ) -> tuple[Float[Tensor, "batch kv_heads queries value_dim"], Float[Tensor, "batch kv_heads queries"]]:
        """Output and log-sum-exp that attention over the evicted entries alone would have; -inf where there are none."""

    def read(
        self,
        state: State,
        query: Float[Tensor, "batch heads queries head_dim"],
        out: Float[Tensor, "batch heads queries value_dim"],
        lse: Float[Tensor, "batch heads queries"],
        scaling: float,
        doubt: Float[Tensor, "batch heads queries"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
        """Attention over kept entries, corrected by what the memory says of the evicted ones, and the log-sum-exp of both.

        `doubt` is the entropy, in [0, 1], of each query over the visual tokens held; only `reads_doubt` needs it.
        """
        kv_heads, queries = next(iter(state.values())).shape[1], query.shape[2]
        grouped = wide(rearrange(query, "b (h g) q d -> b h (g q) d", h=kv_heads))
        found = self.estimate(state, grouped, scaling)
        recalled, mass = (rearrange(x, "b h (g q) ... -> b (h g) q ...", q=queries) for x in found)
        return self.mix(out, lse, recalled, mass), torch.logaddexp(lse, mass)

    def mix(self, out: Tensor, lse: Tensor, recalled: Tensor, mass: Tensor) -> Tensor:
        """One softmax over both parts: an empty memory, or one without mass, leaves the output as it is, bit for bit."""
        share = torch.sigmoid(mass - lse)[..., None]
        known = torch.isfinite(mass)[..., None]
        mixed = torch.lerp(wide(out), torch.where(known, recalled, wide(out)), torch.where(known, share, 0.0))
        return torch.where(known, mixed.to(out.dtype), out)


def wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """In fp32, or more precise where it is already."""
    return x if x.dtype == torch.float64 else x.float()


def state_bytes(state: State) -> int:
    """Bytes of a state."""
    return sum(x.numel() * x.element_size() for x in state.values())
