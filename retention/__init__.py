"""KV-cache eviction with learned retention gates on frozen language and vision-language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retention.attach.hard import evicting
    from retention.attach.soft import attach_gates
    from retention.attach.switch import use_gates
    from retention.budget import Budget
    from retention.cache.config import CacheConfig
    from retention.cache.evicting import EvictingCache
    from retention.gates import GATES, GateConfig, GateSets, RetentionGates
    from retention.models.load import load_frozen
    from retention.planning import plan
    from retention.policies import POLICIES, Policy
    from retention.serving.pipeline import pipeline
    from retention.types import KVState

_HOMES = {
    "GATES": "retention.gates",
    "POLICIES": "retention.policies",
    "Budget": "retention.budget",
    "CacheConfig": "retention.cache.config",
    "EvictingCache": "retention.cache.evicting",
    "GateConfig": "retention.gates",
    "GateSets": "retention.gates",
    "KVState": "retention.types",
    "Policy": "retention.policies",
    "RetentionGates": "retention.gates",
    "attach_gates": "retention.attach.soft",
    "evicting": "retention.attach.hard",
    "load_frozen": "retention.models.load",
    "pipeline": "retention.serving.pipeline",
    "plan": "retention.planning",
    "use_gates": "retention.attach.switch",
}

__all__ = [
    "GATES",
    "POLICIES",
    "Budget",
    "CacheConfig",
    "EvictingCache",
    "GateConfig",
    "GateSets",
    "KVState",
    "Policy",
    "RetentionGates",
    "attach_gates",
    "evicting",
    "load_frozen",
    "pipeline",
    "plan",
    "use_gates",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import retention` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'retention' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
