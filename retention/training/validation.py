"""Accuracy of gates under hard, physical eviction: what chooses the exported gates, never the soft loss."""

from typing import TYPE_CHECKING, Any

import torch

from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache
from retention.data.render import Rendered
from retention.gates import RetentionGates
from retention.policies import POLICIES
from retention.tasks.answering import answer_turns, prefill
from retention.tasks.scorers import SCORERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCOPES = {"global": "db_trim_kv", "per_head": "trim_kv"}


@torch.no_grad()
def hard_eviction_accuracy(
    model: "PreTrainedModel", gates: RetentionGates, rendered: Rendered, budgets: list[str], *, pad: int
) -> list[dict[str, Any]]:
    """Rows of scope, budget and accuracy: the contexts are prefilled once and evicted at every budget."""
    rows = []
    with evicting(model, POLICIES["full"](), CacheConfig(), gates=gates, extra_collectors=("gate",)) as cache:
        prefill(model, cache, rendered)
        rows.append({"scope": "global", "budget": "full", "accuracy": _accuracy(model, cache.fork(), rendered, pad)})
        for budget in budgets:
            for scope, policy in SCOPES.items():
                fork = cache.fork(POLICIES[policy](), CacheConfig(budget=Budget.parse(budget)))
                fork.evict()
                rows.append({"scope": scope, "budget": budget, "accuracy": _accuracy(model, fork, rendered, pad)})
    return rows


def _accuracy(model: "PreTrainedModel", cache: EvictingCache, rendered: Rendered, pad: int) -> float:
    tokens = answer_turns(model, cache, rendered, pad=pad)
    scores = []
    for answers, turns, example in zip(tokens, rendered.turns, rendered.examples, strict=True):
        for produced, reference, turn in zip(answers, turns.answers, example.turns, strict=True):
            exact = produced[: len(reference)] == reference
            scores.append(float(exact) if turn.scorer in SCORERS else 0.0)
    return sum(scores) / len(scores)
