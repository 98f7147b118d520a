"""How far decaying gates are from real eviction: KL of both to the full cache, on a few held-out examples."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from retention.attach.hard import evicting
from retention.attach.hidden import entrance, final_hidden
from retention.attach.soft import attach_gates
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache
from retention.data.example import Example
from retention.data.render import Rendered, Renderer
from retention.gates import RetentionGates
from retention.losses import distillation_terms
from retention.models.family import decoder_of, head_of
from retention.objectives import Objective
from retention.objectives.distillation import Distillation
from retention.policies import POLICIES, Policy, policy_of
from retention.tasks.answering import feed, prefill
from retention.training.module import GateTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES = 4
"""Held-out examples, at most."""
RANKED = {"global": "db_trim_kv", "local": "trim_kv"}
"""Policies by the scope of the objective."""


@torch.no_grad()
def soft_hard_gap(
    model: "PreTrainedModel",
    gates: RetentionGates,
    objective: Distillation,
    examples: list[Example],
    renderer: Renderer,
    frozen: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """KL to the full cache at the scored labels, in nats: of the gated forward, of a cache that evicts, the difference.

    The cache really evicts: contexts are prefilled, cut down to the training budget (of a range its geometric middle),
    and all turns follow with their reference answers. Inside `frozen()` the model is the teacher.
    """
    examples, budget = [e.whole() for e in examples[:EXAMPLES]], middle(objective)
    batch, rendered = renderer.training_batch(examples), renderer.render(examples)
    labels, head = batch.labels.to(model.device), head_of(model)
    entries = [budget.resolve(x, num_layers=1, num_kv_heads=1, entry_bytes=1) for x in rendered.lengths]
    start = entrance(model, {k: v.to(model.device) for k, v in batch.inputs.items()})
    with frozen():
        teacher = final_hidden(model, start)
    with attach_gates(model, gates, budget=torch.tensor(entries, dtype=torch.float, device=model.device)):
        soft = final_hidden(model, start)
    turns = [
        [token for pair in zip(row.questions, row.answers, strict=True) for part in pair for token in part]
        for row in rendered.turns
    ]
    with evicting(model, POLICIES[RANKED[objective.scope]](), CacheConfig(budget), gates=gates) as cache:
        prefill(model, cache, rendered)
        hard = _hidden_of(model, cache, turns, renderer.pad)
    last = slice(-hard.shape[1], None)
    figures = {}
    for name, student, rows in (("soft", soft, slice(None)), ("hard", hard, last)):
        (total, count), _ = distillation_terms(student, teacher[:, rows], labels[:, rows], head)
        figures[f"gap/{name}_kl"] = float(total / count.clamp(min=1))
    return {**figures, "gap": figures["gap/hard_kl"] - figures["gap/soft_kl"]}


def gap_of(module: L.LightningModule, contexts: Rendered, renderer: Renderer) -> Callable[[], dict[str, float]] | None:
    """The measure for a run on these contexts; None where gates do not decay under a budget, or nothing is answered."""
    if not isinstance(module, GateTrainer) or not isinstance(module.objective, Distillation):
        return None
    examples = [e for e in contexts.examples if e.turns][:EXAMPLES]
    frozen = nullcontext if module.student is None else module.student.off
    given = module.model, module.gates, module.objective, examples, renderer, frozen
    return partial(soft_hard_gap, *given) if examples else None


def target(objective: Objective, otherwise: str) -> tuple[Policy, Budget]:
    """The policy that ranks by gates of an objective, and the budget they are trained for, or the other one."""
    if not isinstance(objective, Distillation):
        return POLICIES[policy_of(objective.name)](), Budget.parse(otherwise)
    return POLICIES[RANKED[objective.scope]](), middle(objective)


def middle(objective: Distillation) -> Budget:
    """The training budget, of a range the geometric middle."""
    low, high = objective.limits()
    return low if low == high else Budget(math.sqrt(low.amount * high.amount), low.unit)


def _hidden_of(
    model: "PreTrainedModel", cache: EvictingCache, rows: list[list[int]], pad: int
) -> Float[Tensor, "batch tokens hidden"]:
    """Final hidden states of rows that are fed on top of what a cache holds."""
    found: list[Tensor] = []

    def note(module: Any, args: Any, out: Any) -> None:
        found.append(out.last_hidden_state)

    hook = decoder_of(model).register_forward_hook(note)
    try:
        feed(model, cache, rows, pad=pad)
    finally:
        hook.remove()
    return found[0]
