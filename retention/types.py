"""Axis words, the few dataclasses that travel between rooms, and how their settings are checked.

Axes: `batch` sequences, `tokens` of a sequence, `queries` and `keys` of an attention call, `heads` query
heads, `kv_heads` key-value heads, `head_dim`, `hidden` features, `layers` evictable decoder layers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property

from jaxtyping import Bool, Float, Int
from torch import Tensor


def require(checks: Iterable[tuple[bool, str, object]]) -> None:
    """Check settings: whether each holds, what is expected, what came.

    Raises:
        ValueError: for the first that does not hold.
    """
    for holds, expected, got in checks:
        if not holds:
            raise ValueError(f"expected {expected}, got {got!r}")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a frozen decoder; `layers` lists the indices of its evictable (full-attention) layers."""

    model_type: str
    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int

    @property
    def num_layers(self) -> int:
        """Number of evictable layers."""
        return len(self.layers)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self) | {"layers": list(self.layers)}


@dataclass
class KVState:
    """What a policy may look at: the cached entries of one layer, heads padded to the longest.

    Keys and values are laid out only when a policy reads them, since most rank without.
    """

    load: Callable[[], tuple[Tensor, Tensor]]
    """Returns keys and values, [batch, kv_heads, keys, head_dim] each."""
    positions: Int[Tensor, "batch kv_heads keys"]
    """Sequence index of each entry, padding excluded."""
    valid: Bool[Tensor, "batch kv_heads keys"]
    """False for padding and holes; their scores are ignored."""
    visual: Bool[Tensor, "batch kv_heads keys"]
    protected: Bool[Tensor, "batch kv_heads keys"]
    """Entries a user asked to keep, whatever their score."""
    seen: Int[Tensor, " batch"]
    """Tokens processed so far: the position of the next query."""
    log_beta: Float[Tensor, "batch kv_heads keys"] | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """Filled by the policy's collector, [batch, kv_heads, ..., keys]."""
    layer: int = 0
    evidence: Bool[Tensor, "batch kv_heads keys"] | None = None
    """Entries that answer the questions, where they were named."""
    layers: int = 1
    """How many layers there are."""
    looked: Callable[[], Bool[Tensor, "batch positions"]] | None = None
    """Which sequence positions are visual, also of tokens that left."""
    allowance: Int[Tensor, "batch kv_heads"] | None = None
    """Entries that each head may hold by now, in proportion to what the last prompt left; for rules for decoding."""
    suffix: Bool[Tensor, "batch kv_heads keys"] | None = None
    """Prompts' text behind their last visual token; for rules for decoding."""

    @cached_property
    def _loaded(self) -> tuple[Tensor, Tensor]:
        return self.load()

    @property
    def keys(self) -> Float[Tensor, "batch kv_heads keys head_dim"]:
        """Post-RoPE, as cached."""
        return self._loaded[0]

    @property
    def values(self) -> Float[Tensor, "batch kv_heads keys value_dim"]:
        """As cached."""
        return self._loaded[1]


@dataclass
class Batch:
    """A rendered batch: model inputs by name, with labels (-100 where nothing is scored)."""

    inputs: dict[str, Tensor]
    labels: Int[Tensor, "batch tokens"]
    ids: list[str]
    context: Int[Tensor, " batch"] | None = None
    """Tokens of each row before its first question, where there are questions."""


@dataclass
class LossTerms:
    """Named (total, count) pairs; the step loss is the weighted sum of their quotients."""

    terms: dict[str, tuple[Float[Tensor, ""], Float[Tensor, ""]]]
    weights: dict[str, float]
    least: float = 1.0
    """Counts below it count as it: less than 1 where a count is a process's share of all."""

    def means(self) -> dict[str, Float[Tensor, ""]]:
        """Each term divided by its count (0 where the count is 0)."""
        return {name: total / count.clamp(min=self.least) for name, (total, count) in self.terms.items()}

    def loss(self) -> Float[Tensor, ""]:
        """Weighted sum of the means."""
        means = self.means()
        return sum(
            (self.weights[name] * value for name, value in means.items()), start=0.0 * next(iter(means.values()))
        )
