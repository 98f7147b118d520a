"""The Lightning module: forwards, objective, logging; no maths of its own."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
    objective.begin(step, valid)
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

    def setup(self, stage: str) -> None:
        """Share the frozen base out, once the processes have joined."""
        if self.config.strategy == "fsdp":
            from retention.training.sharding import shard_base

            shard_base(self.model, self.trainer.strategy.root_device)

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Done where a step begins: Lightning would do it behind the backward of all batches but the last."""

    def training_step(self, batches: list[Batch], batch_idx: int) -> Tensor:
        """Forwards and objective of every batch of a step, the backward of all but the last, which Lightning does.

        Each loss is a share of the step's, so gradients add up to those of one batch with all rows. So does the value.
        """
        for parameter in self.parameters():
            parameter.grad = None
        ahead, passed, figures = self._counts(batches), torch.zeros((), device=self.model.device), []
        for number, batch in enumerate(batches):
            loss, told = self._loss(batch, ahead, len(batches))
            figures.append(told)
            if number + 1 < len(batches):
                (loss / len(batches)).backward()  # no process waits for another before the step's last backward
                passed = passed + loss.detach() / len(batches)
        loss = loss / len(batches) + passed
        means = {name: torch.stack([told[name] for told in figures]).mean() for name in figures[0]}
        if self.multiplier is not None:
            means["loss/multiplier"] = torch.tensor(self.multiplier)
            excess = self.trainer.strategy.reduce(means["excess"], reduce_op="mean")  # one multiplier for all ranks
            self.multiplier = self.objective.next_multiplier(self.multiplier, float(excess))
        rows = sum(len(batch.ids) for batch in batches)
        self.log_dict({"loss": loss.detach(), **means}, prog_bar=True, batch_size=rows)
        return loss

    def _step(self, batch: Batch, device: torch.device) -> Step:
        """The step that a batch belongs to: the same draws for each."""
        generator, done = self.step_generator(self.global_step), self.global_step / self.config.max_steps
        context = None if batch.context is None else batch.context.to(device)
        return Step(batch.labels.to(device), generator, done, context=context, multiplier=self.multiplier)

    def _counts(self, batches: Sequence[Batch]) -> dict[str, float] | None:
        """What the losses of a step's batches will count together; None for a single one, which counts by itself."""
        if len(batches) == 1:
            return None
        found: dict[str, float] = {}
        for batch in batches:
            step = self._step(batch, torch.device("cpu"))
            rows, tokens = batch.labels.shape
            valid = valid_tokens(batch.inputs.get("attention_mask"), rows, tokens, batch.labels.device)
            self.objective.begin(step, valid)
            for name, count in self.objective.counts(step, valid, self.gates.shape).items():
                found[name] = found.get(name, 0.0) + count
        return found

    def _loss(self, batch: Batch, ahead: Mapping[str, float] | None, batches: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch's loss, to be meaned over the step's batches and all processes; what is logged of it."""
        device = self.model.device
        inputs = {k: v.to(device) for k, v in batch.inputs.items()}
        how: dict[str, Any] = {"recompute": self.config.recompute_activations, "student": self.student}
        step = self._step(batch, device)
        collected = collect(self.model, self.gates, self.objective, inputs, step, packing=self.packing, **how)
        self.last_log_beta = collected.log_beta
        terms, figures = self.objective.loss(collected)
        terms = across_ranks(terms, ahead, batches)
        return terms.loss(), {f"loss/{k}": v.detach() for k, v in terms.means().items()} | figures

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The multiplier, and everything an export needs besides the tensors, so that it needs no base."""
        checkpoint["gate_card"] = json.dumps(self.gates.card_config())
        checkpoint["adapter_card"] = None if self.student is None else json.dumps(self.student.card())
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
