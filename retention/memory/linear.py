"""A linear state of evicted tokens: feature maps of keys times values, summed, with entropy-guided decay."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from retention.memory.base import Evicted, MemoryConfig, MemoryLayer, State
from retention.types import ModelShape

BANKS = 2
"""Vision and text."""
HALF_LIFE = 10_000.0
"""In absorbed tokens, at the start of training."""
LOG_ETA_MIN = math.log(0.99)
"""Least retention per absorbed token."""


@dataclass
class Linear(MemoryConfig):
    """Two banks per KV head, `S = sum w phi_k(k) v^T` and `z = sum w phi_k(k)`, read as one softmax with what was kept.

    `lse_M = log Z`, `o_M = N / Z` with `N = sum_b exp(c_b) phi_q(q)^T S_b` and `Z` likewise; same family as LESS
    (arXiv 2402.09398) and LoLCATs (2410.10254). The entropy-guided transition is a reconstruction.
    """

    name = "linear"
    trained = True

    features: int = 16
    """Features per head: the state weighs `4 (features x head_dim + features)` bytes per bank."""
    hidden: int = 64
    """Width of the feature maps' hidden layer."""
    feature_map: str = "mlp"
    """mlp (softplus of a two-layer map), hedgehog (softmax of a linear map and of its negative) or elu1."""
    readout: str = "joint"
    """joint (weight = estimated missing mass) or gated (one learned weight per head; an ablation)."""
    text_decay: str = "step"
    """step (entropy-guided) or none, for the text bank."""
    vision_decay: str = "none"
    """The same for the vision bank."""
    tau: float = 0.0
    """Evicted text joins only above this entropy; 0 is all of it."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("feature_map", ("mlp", "hedgehog", "elu1")),
            ("readout", ("joint", "gated")),
            ("text_decay", ("step", "none")),
            ("vision_decay", ("step", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected memory.{name} among {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.features < 2 or self.features % 2 or self.hidden < 1:
            raise ValueError(
                f"expected an even memory.features of at least 2 and memory.hidden of at least 1, got {self.features} "
                f"and {self.hidden}"
            )

    def build(self, shape: ModelShape) -> "LinearLayer":
        """Feature maps and transition of one layer."""
        return LinearLayer(self, shape.num_kv_heads, shape.head_dim)


class FeatureMap(nn.Module):
    """Positive features of keys or queries, one map per KV head."""

    def __init__(self, config: Linear, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.kind = config.feature_map
        width = {"mlp": config.features, "hedgehog": config.features // 2, "elu1": 0}[self.kind]
        hidden = config.hidden if self.kind == "mlp" else head_dim
        self.first = (
            nn.Parameter(torch.randn(kv_heads, head_dim, hidden) * head_dim**-0.5) if self.kind == "mlp" else None
        )
        self.last = nn.Parameter(torch.randn(kv_heads, hidden, width) * hidden**-0.5) if width else None
        self.bias = nn.Parameter(torch.zeros(kv_heads, 1, width)) if width else None

    def forward(self, x: Float[Tensor, "batch kv_heads n head_dim"]) -> Float[Tensor, "batch kv_heads n features"]:
        """At least 0."""
        if self.last is None or self.bias is None:
            return F.elu(x) + 1
        hidden = x if self.first is None else F.gelu(x @ self.first)
        scores = hidden @ self.last + self.bias
        if self.kind == "mlp":
            return F.softplus(scores)
        return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1)


class LinearLayer(MemoryLayer):
    """Transition and readout of one layer, fp32."""

    def __init__(self, config: Linear, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.kv_heads, self.head_dim = config, kv_heads, head_dim
        self.features = head_dim if config.feature_map == "elu1" else config.features
        self.of_key, self.of_query = FeatureMap(config, kv_heads, head_dim), FeatureMap(config, kv_heads, head_dim)
        step = math.log(math.expm1(math.log(2) / HALF_LIFE))

        def scalars(value: float) -> nn.Parameter:
            return nn.Parameter(torch.full((kv_heads, 1), value))

        self.step_entropy, self.step_bias, self.rate = scalars(-5.0), scalars(step), scalars(math.log(math.e - 1))
        self.weight_attention, self.weight_bias = scalars(0.0), scalars(math.log(math.e - 1))
        self.log_scale = nn.Parameter(torch.zeros(BANKS, kv_heads))
        self.gate = nn.Parameter(torch.full((kv_heads, 1), -4.0)) if config.readout == "gated" else None

    def empty(self, batch: int, device: torch.device) -> State:
        """Zeros: banks of `[features, value_dim]` and `[features]`, and how many tokens each absorbed."""
        shape = (batch, self.kv_heads, BANKS)
        sizes = {"sum": (*shape, self.features, self.head_dim), "norm": (*shape, self.features), "count": shape}
        return {name: torch.zeros(size, device=device) for name, size in sizes.items()}

    def log_eta(self, entropy: Float[Tensor, "batch kv_heads n"]) -> Float[Tensor, "batch kv_heads n"]:
        """Log retention of the state per absorbed token: a widely attended token (high entropy) makes a small step."""
        step = F.softplus(F.softplus(self.step_entropy) * (1 - entropy) + self.step_bias)
        return (-F.softplus(self.rate) * step).clamp(min=LOG_ETA_MIN)

    def absorb(self, state: State, evicted: Evicted) -> State:
        """All at once: `S' = exp(c_n) S + sum_i exp(c_n - c_i) w_i phi_i v_i^T`, `c` the running log retention."""
        if not evicted.mask.shape[-1]:
            return state
        phi = self.of_key(evicted.keys.float())
        weight = F.softplus(self.weight_attention * evicted.attention + self.weight_bias)
        text = ~evicted.visual & (evicted.entropy >= self.config.tau)
        fresh: dict[str, list[Tensor]] = {"sum": [], "norm": [], "count": []}
        for bank, (mine, decay) in enumerate(
            ((evicted.visual, self.config.vision_decay), (text, self.config.text_decay))
        ):
            joins = mine & evicted.mask
            running = (
                (self.log_eta(evicted.entropy) * joins).cumsum(-1) if decay == "step" else torch.zeros_like(weight)
            )
            last = running[..., -1:]
            part = ((last - running).exp() * weight * joins)[..., None] * phi
            kept = last.exp()
            fresh["sum"].append(
                kept[..., None] * state["sum"][:, :, bank] + part.transpose(-1, -2) @ evicted.values.float()
            )
            fresh["norm"].append(kept * state["norm"][:, :, bank] + part.sum(-2))
            fresh["count"].append(state["count"][:, :, bank] + joins.sum(-1))
        return {name: torch.stack(parts, 2) for name, parts in fresh.items()}

    def estimate(
        self, state: State, query: Float[Tensor, "batch kv_heads queries head_dim"], scaling: float
    ) -> tuple[Float[Tensor, "batch kv_heads queries value_dim"], Float[Tensor, "batch kv_heads queries"]]:
        """Banks summed, each with its learned scale."""
        phi = self.of_query(query)
        scale = self.log_scale.exp().T[None, :, :, None, None]
        total = phi @ (scale * state["sum"]).sum(2)
        mass = (phi @ (scale[..., 0] * state["norm"]).sum(2)[..., None])[..., 0]
        some = (state["count"].sum(2) > 0)[..., None]
        safe = torch.where(some, mass, 1.0).clamp(min=1e-20)
        return total / safe[..., None], torch.where(some, safe.log(), float("-inf"))

    def mix(self, out: Tensor, lse: Tensor, recalled: Tensor, mass: Tensor) -> Tensor:
        """Joint by default; the ablation mixes by one learned weight per head, whatever is missing."""
        if self.gate is None:
            return super().mix(out, lse, recalled, mass)
        groups = out.shape[1] // self.kv_heads
        weight = self.gate.repeat_interleave(groups, 0)[None].expand(mass.shape)
        return super().mix(out, torch.zeros_like(lse), recalled, torch.where(torch.isfinite(mass), weight, mass))
