"""The arms of an evaluation: a policy with the cache settings of one cell, under the name that tables show."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from retention.cache.config import CacheConfig
from retention.evaluation.config import MEMORY, QUOTA, EvalConfig, base_name, prefix_of
from retention.evaluation.protocol import Protocol
from retention.policies import Policy

FULL_BUDGET = "100%"


@dataclass
class Arm:
    """One policy at one budget under one protocol."""

    name: str
    policy: Policy
    cache: CacheConfig
    budget: str
    protocol: Protocol
    needs_gates: bool

    @property
    def scope(self) -> str:
        """Global when all layers and heads compete for one pool."""
        return "global" if (self.cache.allocator or self.policy.allocator) == "global" else "per_head"


def full_arm(config: EvalConfig, protocol: Protocol) -> Arm:
    """The full cache, in our storage, nothing evicted."""
    cache = config.cache_for(FULL_BUDGET, protocol)
    return Arm("full", config.policy["full"], cache, FULL_BUDGET, protocol, False)


def needs_gates(config: EvalConfig, name: str) -> bool:
    """Whether a policy name stands for anything that trained gates take part in."""
    return bool(prefix_of(name)) or name == QUOTA or config.policy[name].needs_gates


def make_arm(
    config: EvalConfig, name: str, budget: str, protocol: Protocol, quota: Float[Tensor, "layers kv_heads"] | None
) -> Arm:
    """An arm by its name in the config.

    `quota+X`, or `quota` with X as its base, is X with the gates' shares per layer and head; other prefixes say what
    becomes of evicted entries.
    """
    policy, prefix = config.policy[base_name(name)], prefix_of(name)
    cache = config.cache_for(budget, protocol)
    if prefix in MEMORY:
        cache = replace(cache, on_evict=MEMORY[prefix])
    if name.startswith(QUOTA):
        assert quota is not None
        cache = replace(cache, allocator="quota", quota=quota.tolist())
    return Arm(name, policy, cache, budget, protocol, needs_gates(config, name))


def mean_counts(kept: Tensor) -> Float[Tensor, "layers kv_heads"]:
    """Mean kept entries per layer and head over contexts, from counts [layers, batch, kv_heads]."""
    return kept.to(torch.float64).mean(1)
