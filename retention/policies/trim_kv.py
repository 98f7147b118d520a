"""TRIM-KV: learned retention gates, each head keeps its best (arXiv 2512.03324)."""

from dataclasses import dataclass

from retention.policies.decaying import DecayingPolicy


@dataclass
class TrimKV(DecayingPolicy):
    """Log retention, ranked per KV head: per-head eviction is what names this policy."""
