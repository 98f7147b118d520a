"""Accuracy of gates under hard, physical eviction: what chooses the exported gates, never the soft loss."""

from typing import TYPE_CHECKING, Any

import torch

from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache
from retention.data.render import Rendered, Renderer
from retention.gates import RetentionGates
from retention.gates.calibration import SHARES, Calibration, pool_threshold
from retention.policies import POLICIES, Policy, policy_of
from retention.tasks.answering import answer_turns, prefill, read_on
from retention.tasks.scorers import SCORERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCOPES = {"global": "global", "per_head": "uniform"}
"""Allocators by the names that rows show."""


@torch.no_grad()
def hard_eviction_accuracy(
    model: "PreTrainedModel", gates: RetentionGates, rendered: Rendered, budgets: list[str], renderer: Renderer
) -> tuple[list[dict[str, Any]], Calibration]:
    """Rows of scope, budget and accuracy: the contexts are prefilled once and evicted at every budget.

    By the policy that ranks by gates of their objective, in one pool and head by head. Beside them the curve of
    thresholds that keep a budget of these contexts.
    """
    rows, policy = [], POLICIES[policy_of(gates.objective)]
    on_evict = "drop" if gates.memory is None else "memory"
    with evicting(model, POLICIES["full"](), CacheConfig(), gates=gates, extra_collectors=("gate",)) as cache:
        prefill(model, cache, rendered)
        rows.append(
            {"scope": "global", "budget": "full", "accuracy": _accuracy(model, cache.fork(), rendered, renderer)}
        )
        for budget in budgets:
            for scope, allocator in SCOPES.items():
                fork = cache.fork(
                    policy(), CacheConfig(budget=Budget.parse(budget), allocator=allocator, on_evict=on_evict)
                )
                fork.evict()
                rows.append({"scope": scope, "budget": budget, "accuracy": _accuracy(model, fork, rendered, renderer)})
        return rows, calibrated(cache, policy())


def calibrated(cache: EvictingCache, policy: Policy) -> Calibration:
    """The curve of a policy's scores over everything a cache holds, each point read at its own budget."""
    seen, thresholds = float(cache.seen().double().mean()), []
    for share in SHARES:
        fork = cache.fork(policy, CacheConfig(budget=Budget(share, "fraction")))
        states = [layer.state() for layer in fork.evicting_layers]
        scores, valid = torch.stack([policy.score(x).float() for x in states]), torch.stack([x.valid for x in states])
        thresholds.append(pool_threshold(scores, valid, share))
    return Calibration([share * seen for share in SHARES], thresholds, seen)


def _accuracy(model: "PreTrainedModel", cache: EvictingCache, rendered: Rendered, renderer: Renderer) -> float:
    """Mean score of all turns, by each turn's own scorer."""
    read_on(model, cache, rendered)
    tokens = answer_turns(model, cache, rendered, pad=renderer.pad)
    scores = [
        SCORERS[turn.scorer](renderer.decode(produced), turn.answer, turn.choices)
        for answers, example in zip(tokens, rendered.examples, strict=True)
        for produced, turn in zip(answers, example.turns, strict=True)
    ]
    return sum(scores) / len(scores)
