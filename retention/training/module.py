"""The Lightning module: forwards, objective, logging; no maths of its own."""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from retention.attach.facts import valid_tokens
from retention.attach.hidden import Entrance, entrance, final_hidden, packed
from retention.attach.recompute import recomputing
from retention.attach.soft import attach_gates
from retention.gates import RetentionGates
from retention.models.family import head_of
from retention.objectives import Objective
from retention.objectives.base import Attended, Collected, GatedCall, Step
from retention.training.config import TrainerConfig
from retention.training.devices import across_ranks
from retention.training.student import Student
from retention.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def collect(
    model: "PreTrainedModel",
    gates: RetentionGates,
    objective: Objective,
    inputs: dict[str, Tensor],
    step: Step,
    *,
    recompute: bool = False,
    packing: bool = False,
    student: Student | None = None,
) -> Collected:
    """What an objective's loss is made of: a teacher forward where it has one, then a forward with gates.

    Images are encoded once for both. With `recompute` layers are run again in the backward instead of kept, with
    `packing` the decoder gets the rows as documents of one. The teacher runs without the `student`'s adapter.
    """
    start = entrance(model, inputs)
    if packing:
        start = packed(model, start)
    batch, tokens = step.labels.shape
    valid = valid_tokens(inputs.get("attention_mask"), batch, tokens, step.labels.device)
    lengths = objective.budget_lengths(valid.sum(1), step.before_questions(valid))
    step.budget = objective.draw_budget(lengths, step.generator)
    teacher = _before_the_student(model, gates, objective, start, step, nullcontext if student is None else student.off)
    attend = partial(objective.attend, step=step)
    with attach_gates(model, gates, attend, budget=step.budget) as record, recomputing(model, active=recompute):
        hidden = final_hidden(model, start)
    assert record.positions is not None
    assert record.valid is not None
    return Collected(
        teacher,
        hidden,
        record.stacked("score"),
        record.stacked(),
        record.positions,
        record.valid,
        head_of(model),
        step,
        record.stacked("noted"),
    )


@torch.no_grad()
def _before_the_student(
    model: "PreTrainedModel",
    gates: RetentionGates,
    objective: Objective,
    start: Entrance,
    step: Step,
    frozen: Callable[[], AbstractContextManager[object]],
) -> Tensor | None:
    """The teacher's hidden states, and where the objective foresees, what the gates say in a forward without effect.

    One forward serves both unless an adapter tells student from teacher, or there is no teacher.
    """
    hidden = None
    if objective.foresees:
        with attach_gates(model, gates, _untouched, budget=step.budget) as record:
            hidden = final_hidden(model, start)
        step.foreseen = record.stacked()
    if not objective.teacher:
        return None
    if hidden is not None and frozen is nullcontext:
        return hidden
    with frozen():
        return final_hidden(model, start)


def _untouched(call: GatedCall) -> Attended:
    """Attention as the model does it."""
    return None, None


class GateTrainer(L.LightningModule):
    """Trains the gates of a frozen model; its state holds the gates, an adapter if any, and nothing of the model."""

    def __init__(
        self,
        model: "PreTrainedModel",
        gates: RetentionGates,
        objective: Objective,
        config: TrainerConfig,
        *,
        seed: int,
        packing: bool = False,
        student: Student | None = None,
    ) -> None:
        super().__init__()
        self.frozen = (model,)
        self.gates = gates
        self.student = student
        self.objective = objective
        self.multiplier = objective.first_multiplier()
        self.config = config
        self.seed = seed
        self.packing = packing
        self.last_log_beta: list[Tensor] = []

    @property
    def model(self) -> "PreTrainedModel":
        """The frozen model, kept out of this module's parameters."""
        return self.frozen[0]

    def step_generator(self, step: int) -> torch.Generator:
        """Randomness of one step."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Forwards and objective."""
        inputs = {k: v.to(self.model.device) for k, v in batch.inputs.items()}
        done = self.global_step / self.config.max_steps
        step = Step(batch.labels.to(self.model.device), self.step_generator(self.global_step), done)
        step.context = None if batch.context is None else batch.context.to(self.model.device)
        step.multiplier = self.multiplier
        how: dict[str, Any] = {"recompute": self.config.recompute_activations, "student": self.student}
        collected = collect(self.model, self.gates, self.objective, inputs, step, packing=self.packing, **how)
        self.last_log_beta = collected.log_beta
        terms, figures = self.objective.loss(collected)
        terms = across_ranks(terms)
        loss = terms.loss()
        logged = {f"loss/{name}": value.detach() for name, value in terms.means().items()}
        if self.multiplier is not None:
            logged["loss/multiplier"] = torch.tensor(self.multiplier)
            excess = self.trainer.strategy.reduce(figures["excess"], reduce_op="mean")  # one multiplier for all ranks
            self.multiplier = self.objective.next_multiplier(self.multiplier, float(excess))
        self.log_dict({"loss": loss.detach(), **logged, **figures}, prog_bar=True, batch_size=len(batch.ids))
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The multiplier, and everything an export needs besides the tensors, so that it needs no base."""
        checkpoint["gate_card"] = json.dumps(self.gates.card_config())
        checkpoint["multiplier"] = self.multiplier

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the multiplier as it was."""
        self.multiplier = checkpoint.get("multiplier", self.multiplier)

    def configure_optimizers(self) -> Any:
        """AdamW, groups of their own for offsets and growths and for an adapter; warm-up, then linear or cosine to 0."""
        c, own = self.config, ("offset", "growth")
        offsets = [p for name, p in self.gates.named_parameters() if name.endswith(own)]
        others = [p for name, p in self.gates.named_parameters() if not name.endswith(own)]
        groups = [
            {"params": others, "lr": c.lr, "weight_decay": c.weight_decay},
            {"params": offsets, "lr": c.offset_lr, "weight_decay": 0.0},
        ]
        if self.student is not None:
            groups.append({"params": list(self.student.parameters()), "lr": c.lora_lr, "weight_decay": 0.0})
        optimiser = torch.optim.AdamW(groups)

        def scale(step: int) -> float:
            if step < c.warmup_steps:
                return (step + 1) / c.warmup_steps
            done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
            return max(0.0, 1 - done) if c.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, scale)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
