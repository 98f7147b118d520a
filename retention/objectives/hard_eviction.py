"""The second stage: trained gates meet the evictions of a cache, simulated exactly and passed straight through."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retention.budget import Budget
from retention.objectives.base import Attended, GatedCall, Step, decaying
from retention.objectives.distillation import Distillation
from retention.ops.evicted import Fate, fates, hard_weights, soft_weights
from retention.ops.evicted_attention import evicted_attention
from retention.types import require

MODES = ("ste_output", "soft_mask")


@dataclass
class HardEviction(Distillation):
    """Distillation where the student attends to what a cache would have kept (a reconstruction, all of it).

    Survivors of a real eviction do not decay, which gates that were trained by decay alone have never met. Each row is
    evicted where its first question begins (data that does not say so: at its first label; rows scored from their
    start: never), down to the budget, in one pool (scope=global) or head by head. `ste_output`: attention to what is
    kept in the forward, the gradient of attention by decay in the backward, so that evicted tokens get one too.
    `soft_mask`: a key weighs `sigmoid((log_alpha - cut) / temperature)` of its last eviction in both.

    The simulated eviction is that of `db_trim_kv` and `trim_kv`, with one exception: with `evict_every` and
    scope=global, evictions after the first rank by the gates' outputs in a forward without any.
    """

    name: ClassVar[str] = "hard_eviction"
    ranked_as: ClassVar[str | None] = "distillation"
    goes_on: ClassVar[bool] = True

    hard_mode: str = "ste_output"
    """ste_output or soft_mask."""
    evict_every: int | None = None
    """Evict each time that a row has seen so many tokens more; null evicts once, before the first question."""
    temperature: float = 1.0
    """Of soft_mask at the start, in units of log retention."""
    last_temperature: float = 0.05
    """Of soft_mask at the end, reached by a constant factor per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        heats = (self.temperature, self.last_temperature)
        require(
            (
                (self.hard_mode in MODES, f"objective.hard_mode {' or '.join(MODES)}", self.hard_mode),
                (
                    self.evict_every is None or self.evict_every >= 1,
                    "objective.evict_every of at least 1, or null",
                    self.evict_every,
                ),
                (heats[0] >= heats[1] > 0, "temperatures above 0 that do not rise", heats),
            )
        )

    @property
    def foresees(self) -> bool:
        """One pool is decided over all layers at once."""
        return self.scope == "global"

    def budget_lengths(self, lengths: Int[Tensor, " batch"], context: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """As a cache resolves them: fractions of the prompt that is evicted."""
        return context if self.evict_every is None else lengths

    def draw_budget(self, lengths: Int[Tensor, " batch"], generator: torch.Generator) -> Float[Tensor, " batch"]:
        """Whole entries per head, as a cache resolves them; one draw for the whole batch."""
        low, high = self.limits()
        share = float(torch.rand((), generator=generator))
        amount = low.amount * (high.amount / low.amount) ** share
        drawn, sizes = Budget(amount, low.unit), {"num_layers": 1, "num_kv_heads": 1, "entry_bytes": 1}
        entries = [drawn.resolve(length, **sizes) for length in lengths.tolist()]
        return torch.tensor(entries, dtype=torch.float, device=lengths.device)

    def attend(self, call: GatedCall, step: Step) -> Attended:
        """Attention to what is left, the decision made once and remembered."""
        since, kept, cut = self._decision(call, step)
        where: dict[str, Any] = {"positions": call.positions, "valid": call.mask, "allowed": call.allowed}
        given = call.queries, call.keys, call.values
        if self.hard_mode == "soft_mask":
            weights = soft_weights(call.log_beta, call.positions, since, cut, self.heat(step.done))
            return evicted_attention(*given, weights, since, scaling=call.scaling, **where), None
        with torch.no_grad():
            hard = evicted_attention(*given, hard_weights(kept), since, scaling=call.scaling, **where)
        soft = decaying(call, call.log_beta)
        return hard + (soft - soft.detach()), None

    def heat(self, done: float) -> float:
        """The temperature when this share of the run lies behind."""
        return self.temperature * (self.last_temperature / self.temperature) ** done

    def _decision(self, call: GatedCall, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """What becomes of a layer's keys: `since`, `kept` and `cut`."""
        if call.layer not in step.decided:
            layers = step.foreseen if self.foresees else [call.log_beta.detach()]
            found = self._fates(layers, call, step)
            numbers = range(len(layers)) if self.foresees else [call.layer]
            parts = zip(numbers, found.since, found.kept, found.cut, strict=True)
            step.decided.update({number: (since, kept, cut) for number, since, kept, cut in parts})
        decision: tuple[Tensor, Tensor, Tensor] = step.decided[call.layer]
        return decision

    def _fates(self, layers: list[Tensor], call: GatedCall, step: Step) -> Fate:
        assert step.budget is not None
        log_beta, budget = torch.stack(layers), step.budget.round().long()
        if self.evict_every is None:
            moments = step.before_questions(call.valid)[:, None]
        else:
            lengths = call.valid.sum(1)
            steps = torch.arange(1, int(lengths.max()) // self.evict_every + 1, device=lengths.device)
            moments = (self.evict_every * steps).expand(len(lengths), -1)
            moments = moments * (moments <= lengths[:, None])
        return fates(log_beta, call.positions, call.valid, moments, budget, pooled=self.scope == "global")

    def describe(self) -> dict[str, object]:
        """That of distillation, and how evictions were simulated."""
        heats = {"temperatures": [self.temperature, self.last_temperature]} if self.hard_mode == "soft_mask" else {}
        return {
            **super().describe(),
            "stage": self.name,
            "hard_mode": self.hard_mode,
            "evict_every": self.evict_every,
            **heats,
        }
