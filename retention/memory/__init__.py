"""Memories of evicted tokens: the registry, and the stack of one memory per layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from retention.memory.base import Evicted, MemoryConfig, MemoryLayer, NoMemory, State, state_bytes, wide
from retention.memory.linear import Linear
from retention.memory.moment import Moment
from retention.memory.slots import Slots
from retention.types import ModelShape

MEMORIES: dict[str, type[MemoryConfig]] = {"none": NoMemory, "linear": Linear, "slots": Slots, "moment": Moment}


class RetentionMemory(nn.Module):
    """One memory layer for each evictable layer of a model."""

    def __init__(self, config: MemoryConfig, shape: ModelShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.layers = nn.ModuleList(config.build(shape) for _ in shape.layers)

    def layer(self, number: int) -> MemoryLayer:
        """The memory of evictable layer `number`."""
        found = self.layers[number]
        assert isinstance(found, MemoryLayer)
        return found

    def state_bytes(self) -> int:
        """Bytes of the state of one sequence, all layers."""
        return sum(state_bytes(self.layer(i).empty(1, torch.device("cpu"))) for i in range(len(self.layers)))


def memory_from_dict(values: Mapping[str, Any]) -> MemoryConfig:
    """A memory's config from its plain values.

    Raises:
        ValueError: for a name that is not registered.
    """
    name = values.get("name")
    if name not in MEMORIES:
        raise ValueError(f"expected a memory among {', '.join(MEMORIES)}, got {name!r}; update retention")
    return MEMORIES[name](**{k: v for k, v in values.items() if k != "name"})


__all__ = [
    "MEMORIES",
    "Evicted",
    "MemoryConfig",
    "MemoryLayer",
    "NoMemory",
    "RetentionMemory",
    "State",
    "memory_from_dict",
    "state_bytes",
    "wide",
]
