"""How much stays and when eviction runs: everything about a cache that is not its policy."""

import math
from dataclasses import dataclass, field

from retention.budget import ALLOCATORS, HEAD_FORMS, Budget
from retention.cache.evicted import MERGES
from retention.policies import Policy
from retention.types import require

ON_EVICT = ("drop", "merge", "memory", "memory_paid", "refund")
REMEMBER = ("memory", "memory_paid")
SELECTORS = ("head", "layer", "global", "threshold")


@dataclass
class CacheConfig:
    """Budget, factors that override the policy's own, protection, trigger, positions."""

    budget: Budget = field(default_factory=lambda: Budget(0.1, "fraction"))
    """Average kept entries per layer and KV head."""
    allocator: str | None = None
    """uniform, global, quota, pyramid, layers, weighted, head_adaptive or modality; null is the policy's own."""
    selector: str | None = None
    """head, layer, global or threshold; null is the policy's own."""
    threshold: float | None = None
    """Smallest kept score, for selector=threshold; null asks the gates' calibration curve at the budget."""
    quota: list[list[float]] | None = None
    """Shares per layer and head, for allocator=quota."""
    head_floor: float = 0.2
    """Part of the average that every head keeps, or is moved towards, for allocator=head_adaptive."""
    head_form: str = "safeguard"
    """safeguard (every head's best entries up to the floor come first) or mix (counts of one pool, moved towards the
    average by the floor), for allocator=head_adaptive."""
    pyramid_beta: float = 20.0
    """How much smaller the last layer's part of the budget is than the average, for allocator=pyramid."""
    integer_floor: bool = False
    """Round the last layer and the steps between layers down, for allocator=pyramid: as published, totals inexact."""
    layer_weights: list[float] | None = None
    """Share of each layer, for allocator=layers."""
    visual_share: float | None = None
    """Part of each head's budget for visual entries, for allocator=modality; null is in proportion to what is there."""
    min_per_head: int = 0
    """Entries every head keeps under the global selector."""
    sink_size: int = 0
    """First tokens that always stay, inside the budget."""
    recent_size: int = 0
    """Newest tokens that always stay, inside the budget."""
    protect_text: bool = False
    """Text tokens of prompts always stay, inside the budget."""
    on_evict: str | None = None
    """drop; merge (into kept entries); memory (evicted entries flow into a state that later queries
    read back, on top of the budget); memory_paid (the same, its bytes taken out of the entries); refund (drop, and the
    bytes that the memory's state would take go to more entries); null is the policy's own."""
    merge: str = "pivot"
    """pivot, average or weighted: what an evicted entry brings to the kept one with the most similar key; nearest: the
    average, with the kept one of the nearest position. For on_evict=merge."""
    positions: str = "original"
    """original (keys keep the rotation they were written with) or packed (re-rotated to be contiguous)."""
    prefill_chunk: int | None = None
    """Evict after every chunk of this many prompt tokens; null evicts once, after the whole prompt."""
    chunk_by_image: bool = False
    """Evict after every image of the prompt: the peak is the budget plus one image. Adjacent images count as one."""
    evict_every: int | None = None
    """Evict every so many decoded tokens; null lets decoded tokens stay."""

    def __post_init__(self) -> None:
        checks = (
            (self.allocator in (None, *ALLOCATORS), f"cache.allocator among {', '.join(ALLOCATORS)}", self.allocator),
            (self.selector in (None, *SELECTORS), f"cache.selector among {', '.join(SELECTORS)}", self.selector),
            (self.positions in ("original", "packed"), "cache.positions original or packed", self.positions),
            (self.on_evict in (None, *ON_EVICT), f"cache.on_evict among {', '.join(ON_EVICT)}", self.on_evict),
            (self.merge in MERGES, f"cache.merge among {', '.join(MERGES)}", self.merge),
            (
                self.selector == "threshold" or self.threshold is None,
                "cache.threshold with selector=threshold only",
                self.threshold,
            ),
            (
                self.prefill_chunk is None or self.prefill_chunk >= 1,
                "cache.prefill_chunk of at least 1",
                self.prefill_chunk,
            ),
            (self.evict_every is None or self.evict_every >= 1, "cache.evict_every of at least 1", self.evict_every),
            (
                self.prefill_chunk is None or not self.chunk_by_image,
                "cache.prefill_chunk or cache.chunk_by_image, not both",
                True,
            ),
            (
                min(self.sink_size, self.recent_size, self.min_per_head) >= 0,
                "cache sizes of 0 or more",
                "a negative one",
            ),
            (
                1 <= self.pyramid_beta < math.inf,
                "cache.pyramid_beta of at least 1 (1 is equal layers, 20 the published pyramid)",
                self.pyramid_beta,
            ),
            (self.head_form in HEAD_FORMS, f"cache.head_form among {', '.join(HEAD_FORMS)}", self.head_form),
            (0 <= self.head_floor <= 1, "cache.head_floor between 0 and 1", self.head_floor),
            (
                self.allocator != "layers" or self.layer_weights is not None,
                "cache.layer_weights, one number per layer, for cache.allocator=layers",
                self.layer_weights,
            ),
            (
                self.layer_weights is None or _are_weights(self.layer_weights),
                "cache.layer_weights of 0 or more, at least one above 0",
                self.layer_weights,
            ),
            (
                self.visual_share is None or 0 <= self.visual_share <= 1,
                "cache.visual_share between 0 and 1, or null to follow what is there",
                self.visual_share,
            ),
        )
        require(checks)
        protected = self.sink_size + self.recent_size
        if self.budget.unit == "tokens" and protected and self.budget.amount <= protected:
            raise ValueError(
                f"expected a budget above sink_size + recent_size = {protected}, got {self.budget.amount:g} tokens; "
                "raise cache.budget or lower the protected sizes"
            )


def check_policy(policy: Policy, config: CacheConfig, *, rotates: bool, remembers: bool) -> None:
    """Whether a policy can run as configured, in a cache that notes rotary positions, or has a memory, or not.

    Raises:
        ValueError: when it cannot.
    """
    who = type(policy).__name__
    if config.evict_every is not None and not policy.evicts_while_decoding:
        raise ValueError(f"{who} decides after the prompt only and has no rule for decoding; set evict_every to null")
    if policy.steps and config.evict_every not in (None, 1):
        raise ValueError(
            f"{who} drops at most one entry at every decoded token, got evict_every={config.evict_every}; set it to null, or "
            "take the policy's other way to decode"
        )
    if config.positions == "packed" and not rotates:
        raise ValueError(
            "positions 'packed' needs the model's rotary frequencies; open the cache with positions='packed'"
        )
    if config.on_evict in (*REMEMBER, "refund") and not remembers:
        raise ValueError(
            f"on_evict {config.on_evict!r} needs a memory; open the cache with memory=RetentionMemory(...), or gates with one"
        )


def _are_weights(numbers: list[float]) -> bool:
    return all(0 <= number < math.inf for number in numbers) and any(number > 0 for number in numbers)
