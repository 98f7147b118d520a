"""Trains a memory of evicted tokens on frozen gates: first each layer's attention output, then the model's answers."""

import json
import math
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from einops import rearrange
from torch import Tensor

from retention.attach.capture import Capture, capture_attention
from retention.attach.hidden import Entrance, entrance, final_hidden
from retention.attach.recompute import recomputing
from retention.attach.simulate import SimulatedEviction, after_eviction, decide_eviction, simulate_eviction
from retention.budget import Budget
from retention.cache.recall import attention_with_lse
from retention.gates import RetentionGates
from retention.losses import distillation_terms
from retention.memory import MemoryLayer, RetentionMemory
from retention.memory.linear import LinearLayer
from retention.models.family import head_of
from retention.policies import POLICIES
from retention.training.config import MemoryTraining, TrainerConfig
from retention.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASS_WEIGHT = 0.1
"""Of the squared error of the log-sum-exp beside that of the output (a reconstruction)."""


def draw_eviction(capture: Capture, config: MemoryTraining, generator: torch.Generator) -> SimulatedEviction | None:
    """Evict every row's context (everything up to its last visual token, or two thirds of a text) as a policy would.

    Policy and kept share are drawn once for the batch, the share log-uniformly. None where everything fits.
    """
    low, high = (math.log(Budget.parse(x).amount) for x in config.kept.split("-"))
    share = math.exp(low + (high - low) * float(torch.rand((), generator=generator)))
    name = config.policies[int(torch.randint(len(config.policies), (), generator=generator))]
    return decide_eviction(capture, capture.context(), POLICIES[name](), share)


def regression(
    memory: MemoryLayer, eviction: SimulatedEviction, number: int, capture: Capture
) -> tuple[Tensor, dict[str, Tensor]]:
    """Relative squared error of a layer's attention output behind the eviction, and of its log-sum-exp.

    Beside it the recovered fraction `1 - |O - o_full| / |o_R - o_full|` and the missing mass.
    """
    layer, first = capture.layers[number], eviction.first
    given = layer.query, layer.key, layer.value, layer.scaling
    with torch.no_grad():
        later = layer.query[:, :, first:]
        full, full_lse = attention_with_lse(later, layer.key, layer.value, eviction.visible(None), layer.scaling)
        bare, bare_lse = after_eviction(None, eviction, number, *given)
    out, lse = after_eviction(memory, eviction, number, *given)
    real = eviction.later()[:, None].expand(lse.shape).float()
    norm = full.square().sum(-1) + 1e-6

    def mean(x: Tensor) -> Tensor:
        return (x * real).sum() / real.sum().clamp(min=1)

    error = (out - full).square().sum(-1)
    loss = mean(error / norm + MASS_WEIGHT * (lse - full_lse).square())
    before = mean((bare - full).square().sum(-1).sqrt())
    recovered = 1 - mean(error.detach().sqrt()) / before.clamp(min=1e-9)
    return loss, {"recovered": recovered, "missing_mass": mean(1 - (bare_lse - full_lse).exp())}


@torch.no_grad()
def fit_scales(memory: LinearLayer, eviction: SimulatedEviction, number: int, capture: Capture) -> None:
    """Set each bank's log scale so that its log mass is right on average over the queries behind the eviction.

    `c_b = mean of (lse over the bank's tokens - log phi_q . z_b)` per KV head (a reconstruction); a bank that holds
    nothing stays as it is.
    """
    layer, later = capture.layers[number], capture.layers[number].query[:, :, eviction.first :]
    leaving = eviction.evicted(memory, number, layer.query, layer.key, layer.value, layer.scaling)
    state = memory.absorb(memory.empty(len(later), later.device), leaving)
    kv_heads, queries = layer.key.shape[1], later.shape[2]
    phi = memory.of_query(rearrange(later, "b (h g) q d -> b h (g q) d", h=kv_heads).float())
    for bank, mine in enumerate((leaving.visual, ~leaving.visual)):
        seen = (leaving.mask & mine)[:, :, None].expand(-1, -1, queries, -1)
        _, lse = attention_with_lse(later, layer.key, layer.value, seen, layer.scaling)
        mass = rearrange((phi @ state["norm"][:, :, bank, :, None])[..., 0], "b h (g q) -> b (h g) q", q=queries)
        known = torch.isfinite(lse) & (mass > 0) & eviction.later()[:, None]
        gap = torch.where(known, lse - mass.clamp(min=1e-20).log(), 0.0)
        total, count = (rearrange(x.float(), "b (h g) q -> h (b g q)", h=kv_heads).sum(1) for x in (gap, known))
        memory.log_scale[bank] = torch.where(count > 0, total / count.clamp(min=1), memory.log_scale[bank])


class MemoryTrainer(L.LightningModule):
    """Trains `gates.memory`; its state holds the gates with their memory, and nothing of the model."""

    def __init__(
        self,
        model: "PreTrainedModel",
        gates: RetentionGates,
        training: MemoryTraining,
        config: TrainerConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.frozen = (model,)
        self.gates, self.training_config, self.config, self.seed = gates, training, config, seed
        self.last_log_beta: list[Tensor] = []

    @property
    def model(self) -> "PreTrainedModel":
        """The frozen model, kept out of this module's parameters."""
        return self.frozen[0]

    @property
    def memory(self) -> RetentionMemory:
        """What is trained."""
        assert self.gates.memory is not None
        return self.gates.memory

    def training_step(self, batches: list[Batch], batch_idx: int) -> Tensor:
        """A full-cache forward, an eviction drawn from it, and the loss of the stage the step lies in."""
        (batch,) = batches
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        inputs = {k: v.to(self.model.device) for k, v in batch.inputs.items()}
        with torch.no_grad(), capture_attention(self.model, self.gates) as capture:
            start = entrance(self.model, inputs)
            teacher = final_hidden(self.model, start)
        self.last_log_beta = [layer.log_beta for layer in capture.layers if layer.log_beta is not None]
        eviction = draw_eviction(capture, self.training_config, generator)
        if eviction is None:
            return sum((p.sum() for p in self.memory.parameters()), start=torch.zeros(())) * 0.0
        if self.global_step == 0:
            for number, layer in enumerate(self.memory.layers):
                if isinstance(layer, LinearLayer) and layer.config.normalised:
                    fit_scales(layer, eviction, number, capture)
        if self.global_step < self.training_config.regression_share * self.config.max_steps:
            loss = self._regress(eviction, capture)
        else:
            loss = self._distil(eviction, start, teacher, batch.labels)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch.ids))
        return loss

    def _regress(self, eviction: SimulatedEviction, capture: Capture) -> Tensor:
        """Stage 1: every layer by itself, no backward through the model."""
        found = [regression(self.memory.layer(i), eviction, i, capture) for i in range(len(capture.layers))]
        for name in ("recovered", "missing_mass"):
            self.log(f"memory/{name}", torch.stack([figures[name] for _, figures in found]).mean().detach())
        return torch.stack([loss for loss, _ in found]).mean()

    def _distil(self, eviction: SimulatedEviction, start: Entrance, teacher: Tensor, labels: Tensor) -> Tensor:
        """Stage 2: forward KL to the full cache and next token, under hard eviction with the memory in use."""
        again = self.config.recompute_activations
        with simulate_eviction(self.model, eviction, self.memory), recomputing(self.model, active=again):
            student = final_hidden(self.model, start)
        terms = distillation_terms(student, teacher, labels.to(student.device), head_of(self.model))
        kl, ntp = (total / count.clamp(min=1) for total, count in terms)
        self.log_dict({"loss/kl": kl.detach(), "loss/ntp": ntp.detach()})
        return kl + ntp

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything an export needs besides the tensors."""
        checkpoint["gate_card"] = json.dumps(self.gates.card_config())

    def configure_optimizers(self) -> Any:
        """AdamW on the memory alone, warm-up, then linear to 0."""
        c = self.config
        optimiser = torch.optim.AdamW(self.memory.parameters(), lr=c.lr, weight_decay=c.weight_decay)

        def scale(step: int) -> float:
            return min((step + 1) / max(1, c.warmup_steps), max(0.0, 1 - step / c.max_steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, scale)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
