"""The interface of training objectives: what a gated forward and its teacher gave, and the loss terms made of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.types import LossTerms


@dataclass
class Collected:
    """One training forward: final hidden states of teacher and student, gate outputs of all layers."""

    teacher: Float[Tensor, "batch tokens hidden"]
    student: Float[Tensor, "batch tokens hidden"]
    labels: Int[Tensor, "batch tokens"]
    log_beta: list[Float[Tensor, "batch kv_heads tokens"]]
    positions: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]
    head: Callable[[Tensor], Tensor]
    generator: torch.Generator
    """Randomness of this step, seeded by (seed, step): resuming needs no replay."""


@dataclass
class Objective(ABC):
    """Hyper-parameters of a loss and the loss; no state."""

    score_kind: ClassVar[str] = "decay"
    """decay: gates are ranked by log_alpha at inference."""

    @abstractmethod
    def loss(self, collected: Collected) -> tuple[LossTerms, dict[str, Tensor]]:
        """Loss terms, and further figures to log."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """What the artefact's card says of the training."""
