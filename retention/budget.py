"""How many entries stay: budgets in tokens, fractions or bytes, and how they are split over layers and heads."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
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
    weights: Float[Tensor, "*rows parts"],
    total: int | Int[Tensor, "*rows"],
    caps: Int[Tensor, "*rows parts"],
    floor: int = 0,
) -> Int[Tensor, "*rows parts"]:
    """Split each row's `total` in proportion to `weights`, each part within [floor, cap], the surplus redistributed.

    Largest-remainder rounding, ties to the lower index; the sum is exact (or the sum of the caps, if smaller).
    Remainders that differ by rounding noise count as ties, so that a row's counts do not depend on its batch.
    """
    caps, parts = caps.long(), caps.shape[-1]
    total = torch.minimum(torch.as_tensor(total, device=caps.device), caps.sum(-1))
    least = (total // max(parts, 1)).clamp(max=floor)
    weights = weights.double().clamp(min=0)
    share = _clipped(weights, total, torch.minimum(least[..., None], caps).double(), caps.double())
    for _ in range(parts):
        open_parts = share < caps
        left = total - share.sum(-1)
        left = torch.where(open_parts.any(-1) & (left > 1e-9), left, 0.0)[..., None]
        if not left.any():
            break
        pull = torch.where(open_parts, weights, 0.0)
        pull = torch.where(pull.sum(-1, keepdim=True) == 0, open_parts.double(), pull)
        share = torch.minimum(share + left * pull / pull.sum(-1, keepdim=True).clamp(min=1e-300), caps.double())
    counts = share.floor().long()
    order = ((share - counts) * 1e6).round().argsort(dim=-1, descending=True, stable=True)
    extra = torch.arange(parts, device=caps.device) < (total - counts.sum(-1))[..., None]
    return counts + torch.zeros_like(counts).scatter(-1, order, extra.long())


def _clipped(
    weights: Float[Tensor, "*rows parts"],
    total: Int[Tensor, "*rows"],
    floors: Float[Tensor, "*rows parts"],
    caps: Float[Tensor, "*rows parts"],
) -> Float[Tensor, "*rows parts"]:
    """The floors, raised to the same multiple of every weight, within the caps, as far as the total reaches."""
    if not floors.any():
        return floors
    most = torch.where(weights > 0, caps / weights.clamp(min=1e-300), 0.0).amax(-1, keepdim=True)
    low, high = torch.zeros_like(most), most.clamp(max=1e300)
    for _ in range(60):
        middle = (low + high) / 2
        fits = (middle * weights).clamp(min=floors, max=caps).sum(-1, keepdim=True) <= total[..., None]
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return (low * weights).clamp(min=floors, max=caps)


Counts = Int[Tensor, "layers batch kv_heads"]


@dataclass
class AllocationInput:
    """What an allocator may know: entries present per layer, row and head, and what its own option needs."""

    available: Counts
    quota: Float[Tensor, "rows columns"] | None = None
    layer_weights: Float[Tensor, " weights"] | None = None
    window: Int[Tensor, " batch"] | None = None
    """Newest entries that stay in every head; null is none."""
    head_floor: float = 0.2
    """Part of the average that every head of a layer pool keeps, or is moved towards."""
    head_form: str = "safeguard"
    """safeguard or mix."""
    pyramid_beta: float = 20.0
    """The budget above the window, divided by its share in the last layer."""
    integer_floor: bool = False
    """Whether a pyramid's last layer and its steps are rounded down, as published, whatever the total."""
    available_visual: Counts | None = None
    """Those of `available` that are visual."""
    visual_share: Float[Tensor, "layers batch kv_heads"] | float | None = None
    """Visual part of each head's budget; null is in proportion to what is there."""
    weights: Float[Tensor, "layers batch"] | None = None
    """The policy's own weight of each layer; null where it has none."""
    least: int = 0
    """Entries of every head, whatever its layer weighs."""
    redistributes: bool = True
    """Whether what a full layer cannot take goes to the others; otherwise it is lost."""


@dataclass
class Pool:
    """A total per sequence; the selector decides how layers and heads share it."""

    totals: Int[Tensor, " batch"]


@dataclass
class LayerPool:
    """A total per layer and sequence, shared by the layer's heads as the scores decide, above a floor for each head."""

    totals: Int[Tensor, "layers batch"]
    floors: Counts

    def settled(self, won: Counts, available: Counts) -> Counts:
        """Counts of the heads, each of which `won` so many in the pool."""
        return won


@dataclass
class MixedPool(LayerPool):
    """The same, but what a head wins is moved towards the average of all."""

    average: Int[Tensor, " batch"]
    share: float
    """How far, from 0 to 1."""

    def settled(self, won: Counts, available: Counts) -> Counts:
        """Largest remainders; the totals are those of the pool."""
        weights = (1 - self.share) * won.double() + self.share * self.average[:, None].double()
        counts = water_fill(weights.cpu(), torch.minimum(self.totals, available.sum(2)).cpu(), available.cpu())
        return counts.to(available.device)


@dataclass
class Split:
    """Counts of each head for its visual and its text entries, which do not compete with each other."""

    visual: Counts
    text: Counts


Allocator = Callable[[Int[Tensor, " batch"], AllocationInput], "Counts | Pool | LayerPool | Split"]


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
        ValueError: when no quota table was given, or one of another shape.
    """
    if given.quota is None:
        raise ValueError(
            "allocator 'quota' needs a table of shares per layer and head, got none; set cache.quota (an evaluation "
            "measures it on trained gates for policies named quota or quota+X)"
        )
    layers, batch, kv_heads = given.available.shape
    if given.quota.shape != (layers, kv_heads):
        raise ValueError(
            f"expected cache.quota for {layers} layers x {kv_heads} heads, got {' x '.join(map(str, given.quota.shape))}; "
            "write one row per layer with one share per KV head"
        )
    caps = rearrange(given.available.cpu(), "layers batch kv_heads -> batch (layers kv_heads)")
    weights = given.quota.flatten().cpu().expand(batch, -1)
    counts = water_fill(weights, budget.cpu() * layers * kv_heads, caps)
    counts = rearrange(counts, "batch (layers kv_heads) -> layers batch kv_heads", layers=layers)
    return counts.to(given.available.device)


def _by_layer(
    weights: Float[Tensor, "layers batch kv_heads"],
    budget: Int[Tensor, " batch"],
    caps: Counts,
    least: int = 0,
    *,
    redistributes: bool = True,
) -> Counts:
    """Equal heads, then each head's total over its layers by `weights`; what is full hands on its surplus."""
    parts, room = (rearrange(x.cpu(), "layers batch kv_heads -> batch kv_heads layers") for x in (weights, caps))
    heads = room.sum(-1)
    totals = water_fill(torch.ones(heads.shape), budget.cpu() * parts[0].numel(), heads)
    counts = water_fill(parts, totals, room if redistributes else totals[..., None].expand_as(room), least)
    counts = torch.minimum(counts, room)
    return rearrange(counts, "batch kv_heads layers -> layers batch kv_heads").to(caps.device)


def pyramid(budget: Int[Tensor, " batch"], given: AllocationInput) -> Counts:
    """Much for the first layer, little for the last, linear between (PyramidKV, arXiv 2406.02069).

    With `b = budget - window`, the last layer holds `window + b / beta` and the first `window + 2 b - b / beta`,
    or as many as there are: then the last layers hold what is over. With `integer_floor`, `b / beta` and the step
    from layer to layer are whole numbers as in the public code, and the total may fall short or be exceeded.
    """
    layers = len(given.available)
    window = torch.zeros_like(budget) if given.window is None else torch.minimum(given.window, budget)
    above = (budget - window)[:, None].double()
    room = (given.available.amax(0) - window[:, None]).clamp(min=0)
    first = torch.minimum(2 * above - above / given.pyramid_beta, room.double())
    last = 2 * above - first
    if given.integer_floor:
        first = torch.minimum(2 * above - (above / given.pyramid_beta).floor(), room.double())
        step = ((2 * first - 2 * above) / max(layers - 1, 1)).floor()
        counts = window[:, None] + first - step * torch.arange(layers, device=budget.device)[:, None, None]
        return torch.minimum(counts.long().expand_as(given.available), given.available)
    depth = torch.arange(layers, device=budget.device).double()[:, None, None] / max(layers - 1, 1)
    return _by_layer(window[:, None] + first - depth * (first - last), budget, given.available)


def layer_shares(budget: Int[Tensor, " batch"], given: AllocationInput) -> Counts:
    """Fixed weights per layer, the same for all heads, rescaled to the budget.

    Raises:
        ValueError: when no weights were given, or not one per layer.
    """
    count = len(given.available)
    if given.layer_weights is None or len(given.layer_weights) != count:
        got = "none" if given.layer_weights is None else str(len(given.layer_weights))
        raise ValueError(f"allocator 'layers' needs {count} weights, one per layer, got {got}; set cache.layer_weights")
    weights = given.layer_weights.to(given.available.device)[:, None, None].expand(given.available.shape)
    return _by_layer(weights, budget, given.available)


def weighted(budget: Int[Tensor, " batch"], given: AllocationInput) -> Counts:
    """By the weights that the policy reads off each layer, the same for its heads (TGV-KV, CAKE, MEDA, VL-Cache, ...).

    Raises:
        ValueError: when the policy weighs no layers.
    """
    if given.weights is None:
        raise ValueError(
            "allocator 'weighted' needs a policy that weighs layers, got one that does not; choose another"
        )
    weights = given.weights[..., None].expand(given.available.shape)
    return _by_layer(weights, budget, given.available, given.least, redistributes=given.redistributes)


def head_adaptive(budget: Int[Tensor, " batch"], given: AllocationInput) -> LayerPool:
    """The heads of a layer share its budget as the scores decide, each at least a part alpha of the average.

    The safeguarded form of AdaKV (arXiv 2407.11550). The other one, `mix`, pools without floors and then gives a head
    `(1 - alpha) * what it won + alpha * average`.
    """
    totals = torch.minimum(budget * given.available.shape[2], given.available.sum(2))
    if given.head_form == "mix":
        return MixedPool(totals, torch.zeros_like(given.available), budget, given.head_floor)
    floors = (given.head_floor * budget.double()).floor().long()[None, :, None]
    return LayerPool(totals, torch.minimum(floors, given.available))


def modality(budget: Int[Tensor, " batch"], given: AllocationInput) -> Split:
    """Budgets of their own for visual and text entries inside each head, in the manner of MadaKV (arXiv 2506.15724).

    Layers are equal unless the policy weighs them.

    Rounds to the nearest count, halves up; what one modality cannot fill goes to the other.
    """
    assert given.available_visual is not None, "the cache counts visual entries for this allocator"
    totals = uniform(budget, given) if given.weights is None else weighted(budget, given)
    there = given.available_visual
    if given.visual_share is None:
        visual = (2 * totals * there + given.available) // (2 * given.available).clamp(min=1)
    else:
        visual = (totals.double() * given.visual_share + 0.5).floor().long()
    visual = torch.minimum(torch.maximum(visual, totals - (given.available - there)), there)
    return Split(visual, totals - visual)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "global": global_pool,
    "quota": quota,
    "pyramid": pyramid,
    "layers": layer_shares,
    "modality": modality,
    "weighted": weighted,
    "head_adaptive": head_adaptive,
}
HEAD_FORMS = ("safeguard", "mix")
BY_CONTENT = ("modality", "weighted")
"""Allocators that read what is cached, not only how much."""
