"""The Lightning module: forwards, objective, logging; no maths of its own."""

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from retention.attach.facts import valid_tokens
from retention.attach.hidden import entrance, final_hidden
from retention.attach.recompute import recomputing
from retention.attach.soft import attach_gates
from retention.gates import RetentionGates
from retention.models.family import head_of
from retention.objectives import Objective
from retention.objectives.base import Collected, Step
from retention.training.config import TrainerConfig
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
) -> Collected:
    """What an objective's loss is made of: a teacher forward where it has one, then a forward with gates.

    Images are encoded once for both. With `recompute` layers are run again in the backward instead of kept.
    """
    start, teacher = entrance(model, inputs), None
    if objective.teacher:
        with torch.no_grad():
            teacher = final_hidden(model, start)
    batch, tokens = step.labels.shape
    lengths = valid_tokens(inputs.get("attention_mask"), batch, tokens, step.labels.device).sum(1)
    step.budget = objective.draw_budget(lengths, step.generator)
    attend = partial(objective.attend, step=step)
    with attach_gates(model, gates, attend, budget=step.budget) as record, recomputing(model, active=recompute):
        student = final_hidden(model, start)
    assert record.positions is not None
    assert record.valid is not None
    return Collected(
        teacher,
        student,
        record.stacked("score"),
        record.stacked(),
        record.positions,
        record.valid,
        head_of(model),
        step,
        record.stacked("noted"),
    )


class GateTrainer(L.LightningModule):
    """Trains the gates of a frozen model; its state holds the gates and nothing of the model."""

    def __init__(
        self, model: "PreTrainedModel", gates: RetentionGates, objective: Objective, config: TrainerConfig, *, seed: int
    ) -> None:
        super().__init__()
        self.frozen = (model,)
        self.gates = gates
        self.objective = objective
        self.config = config
        self.seed = seed
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
        again = self.config.recompute_activations
        collected = collect(self.model, self.gates, self.objective, inputs, step, recompute=again)
        self.last_log_beta = collected.log_beta
        terms, figures = self.objective.loss(collected)
        loss = terms.loss()
        logged = {f"loss/{name}": value.detach() for name, value in terms.means().items()}
        self.log_dict({"loss": loss.detach(), **logged, **figures}, prog_bar=True, batch_size=len(batch.ids))
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything an export needs besides the tensors, so that it needs no base."""
        checkpoint["gate_card"] = json.dumps(self.gates.card_config())

    def configure_optimizers(self) -> Any:
        """AdamW with offsets and growths in a group of their own; warm-up, then linear or cosine to 0."""
        c, own = self.config, ("offset", "growth")
        offsets = [p for name, p in self.gates.named_parameters() if name.endswith(own)]
        others = [p for name, p in self.gates.named_parameters() if not name.endswith(own)]
        optimiser = torch.optim.AdamW(
            [
                {"params": others, "lr": c.lr, "weight_decay": c.weight_decay},
                {"params": offsets, "lr": c.offset_lr, "weight_decay": 0.0},
            ]
        )

        def scale(step: int) -> float:
            if step < c.warmup_steps:
                return (step + 1) / c.warmup_steps
            done = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
            return max(0.0, 1 - done) if c.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, scale)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
