"""Distillation under a budget: forward KL to the full cache, next token, capacity hinge of fixed or learned weight."""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.budget import Budget
from retention.losses import capacity_loss, distillation_terms, relative_excess
from retention.objectives.base import Collected, Objective, Step
from retention.ops.capacity import every_query, expected_size, sample_queries
from retention.types import LossTerms, ModelShape, require

log = logging.getLogger(__name__)
NORMS, REDUCTIONS = ("exact", "public", "budget", "paper"), ("mean", "active_mean")
CONSTRAINTS = ("hinge", "lagrangian")
BIASED = (
    "objective.capacity_reduction=active_mean is biased where queries are sampled; more of them (objective.queries) bias "
    "it less, objective.queries=0 takes all of them"
)


@dataclass
class Distillation(Objective):
    """`loss = kl_weight * KL + ntp_weight * NTP + capacity_weight * capacity` (arXiv 2512.03324, 2605.09649).

    Weights of the public code (it averages the two base losses); the paper writes a plain sum, 1 / 1 / 1. The
    capacity is evaluated at sampled query positions, unbiased for the mean over all, or at all of them. With `constraint: lagrangian` the
    weight of the capacity is a multiplier that meets the budget, raised while the expected cache size (its mean over
    layers and heads, in either scope) lies above the budget and lowered while it lies below (a reconstruction).
    """

    name: ClassVar[str] = "distillation"

    budget: str = "1%-8%"
    """Training budget: tokens per head, a fraction of the context, or a range that each step draws from, log-uniformly."""
    kl_weight: float = 0.5
    """Weight of the forward KL to the full cache."""
    ntp_weight: float = 0.5
    """Weight of the next-token cross-entropy."""
    capacity_weight: float = 1.0
    """Weight of the capacity hinge, where a multiplier starts; a fixed 0 only as an ablation."""
    constraint: str = "hinge"
    """hinge (the capacity's weight is fixed) or lagrangian (it follows how far the budget is missed)."""
    lagrangian_rate: float = 0.05
    """What a step adds to the multiplier for each budget of excess, at most one."""
    scope: str = "global"
    """global (one pool, DBTrimKV) or local (every head, TRIM-KV)."""
    capacity_norm: str = "exact"
    """exact, public, budget or paper: what the excess is divided by."""
    capacity_reduction: str = "mean"
    """mean (over all queries past the budget) or active_mean (over violations; biased at sampled queries)."""
    queries: int = 41
    """Query positions at which the capacity is evaluated, drawn at every step; 0 for all of them, the exact capacity."""

    def __post_init__(self) -> None:
        low, high = self.limits()
        weights = (self.kl_weight, self.ntp_weight, self.capacity_weight)
        checks = (
            (
                low.unit == high.unit and low.unit != "bytes",
                "objective.budget in tokens or fractions, e.g. 16, 5% or 1%-8%",
                self.budget,
            ),
            (low.amount <= high.amount, "objective.budget ranges from low to high", self.budget),
            (min(weights) >= 0 and max(weights) > 0, "loss weights of 0 or more, one above 0", weights),
            (self.scope in ("global", "local"), "objective.scope global or local", self.scope),
            (
                self.capacity_norm in NORMS,
                f"objective.capacity_norm among {', '.join(NORMS)}",
                self.capacity_norm,
            ),
            (
                self.capacity_reduction in REDUCTIONS,
                f"objective.capacity_reduction {' or '.join(REDUCTIONS)}",
                self.capacity_reduction,
            ),
            (self.queries >= 0, "objective.queries of at least 1, or 0 for all", self.queries),
            (
                self.constraint in CONSTRAINTS,
                f"objective.constraint {' or '.join(CONSTRAINTS)}",
                self.constraint,
            ),
            (self.lagrangian_rate > 0, "objective.lagrangian_rate above 0", self.lagrangian_rate),
        )
        require(checks)
        if self.capacity_reduction == "active_mean" and self.queries:
            log.warning(BIASED)

    def limits(self) -> tuple[Budget, Budget]:
        """Smallest and largest training budget."""
        parts = str(self.budget).split("-")
        if len(parts) > 2:
            raise ValueError(f"expected objective.budget like 16, 5% or 1%-8%, got {self.budget!r}")
        return Budget.parse(parts[0]), Budget.parse(parts[-1])

    def draw_budget(self, lengths: Int[Tensor, " batch"], generator: torch.Generator) -> Float[Tensor, " batch"]:
        """This step's budget in entries per head, one draw for the whole batch."""
        low, high = (math.log(b.amount) for b in self.limits())
        amount = math.exp(low + (high - low) * float(torch.rand((), generator=generator)))
        scale = lengths.float() if self.limits()[0].unit == "fraction" else torch.ones_like(lengths, dtype=torch.float)
        return (amount * scale).clamp(min=1.0)

    def first_multiplier(self) -> float | None:
        """The hand-set weight, where there is a multiplier at all."""
        return self.capacity_weight if self.constraint == "lagrangian" else None

    def next_multiplier(self, multiplier: float, excess: float) -> float:
        """Dual ascent: `max(0, multiplier + rate * min(1, excess))`, with the signed excess in budgets.

        It is at least -1 by itself. Without a bound above, the first steps, where nothing is forgotten yet, would wind
        the multiplier up further than a run can unwind it (a reconstruction).
        """
        return max(0.0, multiplier + self.lagrangian_rate * min(1.0, excess))

    def counts(self, step: Step, valid: Bool[Tensor, "batch tokens"], shape: ModelShape) -> dict[str, float]:
        """Scored labels; sequences longer than their budget."""
        assert step.budget is not None
        longer = valid.sum(1) - 1 >= step.budget
        return {"kl": step.scored(), "ntp": step.scored(), "capacity": float(longer.sum())}

    def loss(self, collected: Collected) -> tuple[LossTerms, dict[str, Tensor]]:
        """The three terms; logged beside them: retained mass and its budget, entries per head."""
        lengths, step = collected.valid.sum(1), collected.step
        assert step.budget is not None
        budget = step.budget
        queries = every_query(lengths)
        if self.queries:
            queries = sample_queries(lengths, budget, self.queries, step.generator)
        sizes = torch.stack(
            [expected_size(beta, collected.positions, queries, collected.valid) for beta in collected.log_beta]
        )
        assert collected.teacher is not None
        kl, ntp = distillation_terms(collected.student, collected.teacher, step.labels, collected.head)
        form = {"scope": self.scope, "norm": self.capacity_norm, "reduction": self.capacity_reduction}
        capacity = capacity_loss(sizes, queries, budget, **form)
        pull = self.capacity_weight if step.multiplier is None else step.multiplier
        weights = {"kl": self.kl_weight, "ntp": self.ntp_weight, "capacity": pull}
        terms = LossTerms({"kl": kl, "ntp": ntp, "capacity": capacity}, weights)
        figures = {"retained": sizes[..., -1].mean().detach(), "budget": budget.mean()}
        if self.constraint == "lagrangian":
            figures["excess"] = relative_excess(sizes, queries, budget)
        return terms, figures

    def describe(self) -> dict[str, object]:
        """Budget, weights and scope."""
        how = {} if self.constraint == "hinge" else {"lagrangian_rate": self.lagrangian_rate}
        weights = {"kl": self.kl_weight, "ntp": self.ntp_weight, "capacity": self.capacity_weight}
        return {
            "objective": self.ranked_as or self.name,
            "score_kind": self.score_kind,
            "budget": self.budget,
            "loss_weights": weights,
            "scope": self.scope,
            "capacity_norm": self.capacity_norm,
            "reduction": f"{self.capacity_reduction} over {'sampled' if self.queries else 'all'} queries",
            "constraint": self.constraint,
            **how,
        }
