"""The interface of training objectives: how gates act in a training forward, and the loss made of what it gave."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.losses import IGNORE
from retention.ops.gated import gated_attention
from retention.types import LossTerms, ModelShape


@dataclass
class Step:
    """What is known of a training step before its forwards."""

    labels: Int[Tensor, "batch tokens"]
    generator: torch.Generator
    """Randomness of this step, seeded by (seed, step): resuming needs no replay."""
    done: float = 0.0
    """Share of the run that lies behind."""
    budget: Float[Tensor, " batch"] | None = None
    """Entries per head that this step trains for, where the objective draws them."""
    context: Int[Tensor, " batch"] | None = None
    """Tokens of each row before its first question, where the data says so."""
    multiplier: float | None = None
    """Weight of the constraint now, where the objective has one that the trainer keeps up to date."""
    foreseen: list[Float[Tensor, "batch kv_heads tokens"]] = field(default_factory=list)
    """`log_beta` of all layers before the student runs, where the objective foresees; without gradients."""
    decided: dict[int, Any] = field(default_factory=dict)
    """What an objective decided of a layer, the same when its forward is computed again."""
    drawn: dict[int, Float[Tensor, "..."]] = field(default_factory=dict)

    def before_questions(self, valid: Bool[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
        """Tokens of each row before its first question, or as far as is known: before its first label.

        Of rows that are scored from their very start, all tokens.
        """
        if self.context is not None:
            return self.context
        unscored = (self.labels != IGNORE).cumsum(1) == 0
        before = (unscored & valid).sum(1)
        return torch.where(before > 0, before, valid.sum(1))

    def scored(self) -> float:
        """Positions whose next label is scored."""
        return float((self.labels[:, 1:] != IGNORE).sum())

    def uniform(self, layer: int, shape: torch.Size) -> Float[Tensor, "..."]:
        """Random numbers in [0, 1) of a layer, the same ones when its forward is computed again."""
        if layer not in self.drawn:
            self.drawn[layer] = torch.rand(shape, generator=self.generator)
        return self.drawn[layer]


@dataclass
class GatedCall:
    """One layer's attention in a training forward, and what its gate says of the tokens."""

    layer: int
    """Its number among the gated ones."""
    queries: Float[Tensor, "batch heads tokens head_dim"]
    keys: Float[Tensor, "batch kv_heads tokens head_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    hidden: Float[Tensor, "batch tokens hidden"]
    """The attention's input, which the gate reads too."""
    output: Float[Tensor, "hidden features"] | None
    """Weight of the projection behind attention; None where the model has none of a known name."""
    score: Float[Tensor, "batch kv_heads tokens"]
    log_beta: Float[Tensor, "batch kv_heads tokens"]
    """Log-sigmoid of the score."""
    scaling: float
    positions: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]
    padded: bool
    allowed: Bool[Tensor, "batch 1 tokens tokens"] | None = None
    """What each token may see, where that is more than its past."""

    @property
    def mask(self) -> Bool[Tensor, "batch tokens"] | None:
        """`valid` where there is padding at all."""
        return self.valid if self.padded else None


Attended = tuple[Tensor | None, Tensor | None]
"""A layer's attention output (None: the model's own), and what the loss needs of the layer."""


def decayed(call: GatedCall) -> Attended:
    """Every key decays with its age: retention-gated attention (arXiv 2512.03324)."""
    return decaying(call, call.log_beta), None


def decaying(call: GatedCall, log_beta: Float[Tensor, "batch kv_heads tokens"]) -> Tensor:
    """The layer's attention with these decays; 0 is the frozen model's own."""
    given = call.queries, call.keys, call.values, log_beta
    where: dict[str, Any] = {"scaling": call.scaling, "positions": call.positions, "valid": call.mask}
    return gated_attention(*given, **where, allowed=call.allowed)


@dataclass
class Collected:
    """One training step: final hidden states of teacher and student, gate outputs of all layers."""

    teacher: Float[Tensor, "batch tokens hidden"] | None
    """The full cache's; None where the objective asks for no teacher."""
    student: Float[Tensor, "batch tokens hidden"]
    score: list[Float[Tensor, "batch kv_heads tokens"]]
    log_beta: list[Float[Tensor, "batch kv_heads tokens"]]
    positions: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]
    head: Callable[[Tensor], Tensor]
    step: Step
    noted: list[Tensor] = field(default_factory=list)
    """What `attend` noted of each layer."""


@dataclass
class Objective(ABC):
    """Hyper-parameters of a loss and the loss; no state."""

    name: ClassVar[str]
    score_kind: ClassVar[str] = "decay"
    """decay: gates are ranked by log_alpha at inference; static: by their score, whatever a token's age."""
    gate: ClassVar[str | None] = None
    """The only architecture of gates it can train; null for any."""
    initial_score: ClassVar[float | None] = None
    """Score that gates start from; null leaves it to the gate's half-life."""
    teacher: ClassVar[bool] = True
    """Whether the loss compares with the full cache, which costs a second forward."""
    ranked_as: ClassVar[str | None] = None
    """The objective whose policies rank by its gates, where it is another one."""
    goes_on: ClassVar[bool] = False
    """Whether it is meant for gates that are trained already."""

    @property
    def foresees(self) -> bool:
        """Whether `attend` needs the gates of all layers at once, so that they are read in a forward before."""
        return False

    def first_multiplier(self) -> float | None:
        """Where the weight of a constraint starts that the trainer keeps up to date; None for fixed weights."""
        return None

    def next_multiplier(self, multiplier: float, excess: float) -> float:
        """The weight after a step whose figure `excess` says how far the constraint was missed; a fixed one stays."""
        return multiplier

    def budget_lengths(self, lengths: Int[Tensor, " batch"], context: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The lengths that budgets are fractions of: whole rows, or what comes before their first question."""
        return lengths

    def draw_budget(self, lengths: Int[Tensor, " batch"], generator: torch.Generator) -> Float[Tensor, " batch"] | None:
        """The step's budget in entries per head of rows of these lengths, drawn before its forwards; None for none."""
        return None

    def begin(self, step: Step, valid: Bool[Tensor, "batch tokens"]) -> None:
        """Draw what a step draws before its forwards: its budget."""
        lengths = self.budget_lengths(valid.sum(1), step.before_questions(valid))
        step.budget = self.draw_budget(lengths, step.generator)

    @abstractmethod
    def counts(self, step: Step, valid: Bool[Tensor, "batch tokens"], shape: ModelShape) -> dict[str, float]:
        """What the loss will count in each of its terms, known once the step has begun, before its forwards.

        A step of several batches divides by the counts of all of them, so that it is the step of one large batch.
        """

    def attend(self, call: GatedCall, step: Step) -> Attended:
        """How the gates act on one layer's attention while training."""
        return decayed(call)

    @abstractmethod
    def loss(self, collected: Collected) -> tuple[LossTerms, dict[str, Tensor]]:
        """Loss terms, and further figures to log."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """What the artefact's card says of the training."""
