"""How many entries stay: budgets in tokens, fractions or bytes, and how they are split over layers and heads."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}
_HOW = "write tokens per head (128), a fraction of the context (10%) or bytes (64MiB)"


@dataclass
class Budget:
    """Average kept entries per layer and KV head: `Budget(128)`, `Budget(0.1, "fraction")`, `Budget(2**26, "bytes")`."""

    amount: float
    """How much, in `unit`."""
    unit: str = "tokens"
    """tokens (entries per layer and KV head), fraction (of the context) or bytes (per sequence, all layers)."""

    def __post_init__(self) -> None:
        if self.unit not in ("tokens", "fraction", "bytes"):
            raise ValueError(f"expected a budget unit among tokens, fraction, bytes; got {self.unit!r}")
        if not self.amount > 0:
            raise ValueError(f"expected a budget above 0, got {self.amount:g} {self.unit}; {_HOW}")
        if self.unit == "fraction" and self.amount > 1:
            raise ValueError(f"expected a fraction of at most 1, got {self.amount:g}; {_HOW}")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `128`, `10%` or `64MiB`.

        Raises:
            ValueError: when the text is none of these.
        """
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[kmg]?i?b)?\s*", str(text), re.IGNORECASE)
        unit = (match.group(2) or "").lower() if match else ""
        if not match or (unit and unit != "%" and unit not in _UNITS):
            raise ValueError(f"expected a budget, got {text!r}; {_HOW}")
        amount = float(match.group(1))
        if unit == "%":
            return cls(amount / 100, "fraction")
        return cls(amount * _UNITS[unit], "bytes") if unit else cls(amount)

    def resolve(self, seen: int, *, num_layers: int, num_kv_heads: int, entry_bytes: int, state_bytes: int = 0) -> int:
        """Entries per layer and KV head for a context of `seen` tokens, at least 1.

        Bytes are per sequence and pay for `state_bytes` (a memory's state) first, then for
        `entry_bytes` per entry: keys, values and what is stored beside them.
        """
        if self.unit == "tokens":
            return max(1, round(self.amount))
        if self.unit == "fraction":
            return max(1, math.floor(self.amount * seen + 0.5))
        entries = (self.amount - state_bytes) / (entry_bytes * num_layers * num_kv_heads)
        if entries < 1:
            raise ValueError(
                f"a budget of {self.amount:.0f} bytes holds no entry: one per layer and head takes "
                f"{entry_bytes * num_layers * num_kv_heads + state_bytes} bytes; raise the budget"
            )
        return int(entries)

    def __str__(self) -> str:
        """The form that `parse` reads."""
        if self.unit == "fraction":
            return f"{_plain(100 * self.amount)}%"
        return _plain(self.amount) if self.unit == "tokens" else f"{self.amount:.0f}B"


def _plain(number: float) -> str:
    """Without an exponent, which `parse` does not read."""
    return f"{number:.10f}".rstrip("0").rstrip(".")


def water_fill(
    weights: Float[Tensor, " parts"], total: int, caps: Int[Tensor, " parts"], floor: int = 0
) -> Int[Tensor, " parts"]:
    """Split `total` in proportion to `weights`, each part within [floor, cap], the surplus redistributed.

    Largest-remainder rounding, ties to the lower index; the sum is exact (or the sum of the caps, if smaller).
    """
    caps = caps.long()
    total = min(int(total), int(caps.sum()))
    counts = torch.minimum(torch.full_like(caps, min(floor, total // max(len(caps), 1))), caps)
    share = counts.double()
    weights = weights.double().clamp(min=0)
    for _ in range(len(weights)):
        open_parts = share < caps
        left = total - float(share.sum())
        pull = torch.where(open_parts, weights, torch.zeros_like(weights))
        if left <= 1e-9 or not open_parts.any():
            break
        if pull.sum() == 0:
            pull = open_parts.double()
        share = torch.minimum(share + left * pull / pull.sum(), caps.double())
    counts = share.floor().long()
    order = (share - counts).argsort(descending=True, stable=True)
    for part in order[: total - int(counts.sum())].tolist():
        counts[part] += 1
    return counts


@dataclass
class AllocationInput:
    """What an allocator may know: entries present per layer, row and head, and a quota table if one was given."""

    available: Int[Tensor, "layers batch kv_heads"]
    quota: Float[Tensor, "layers kv_heads"] | None = None


@dataclass
class Pool:
    """A total per sequence; the selector decides how layers and heads share it."""

    totals: Int[Tensor, " batch"]


Counts = Int[Tensor, "layers batch kv_heads"]
Allocator = Callable[[Int[Tensor, " batch"], AllocationInput], "Counts | Pool"]


def uniform(budget: Int[Tensor, " batch"], given: AllocationInput) -> Counts:
    """The budget for every layer and head."""
    return torch.minimum(budget[None, :, None].expand_as(given.available), given.available)


def global_pool(budget: Int[Tensor, " batch"], given: AllocationInput) -> Pool:
    """One pool of layers x heads x budget entries per sequence (arXiv 2605.09649)."""
    layers, _, kv_heads = given.available.shape
    return Pool(torch.minimum(budget * layers * kv_heads, given.available.sum((0, 2))))


def quota(budget: Int[Tensor, " batch"], given: AllocationInput) -> Counts:
    """Fixed shares per layer and head, rescaled to the budget: allocation without scoring.

    Raises:
        ValueError: when no quota table was given.
    """
    if given.quota is None:
        raise ValueError("allocator 'quota' needs a table of shares per layer and head, got none; set cache.quota")
    layers, batch, kv_heads = given.available.shape
    weights = given.quota.flatten().cpu()
    rows = [
        water_fill(weights, int(budget[row]) * layers * kv_heads, given.available[:, row].flatten().cpu())
        for row in range(batch)
    ]
    return torch.stack(rows, 1).view(layers, kv_heads, batch).transpose(1, 2).to(given.available.device)


ALLOCATORS: dict[str, Allocator] = {"uniform": uniform, "global": global_pool, "quota": quota}
