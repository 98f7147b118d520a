"""A linear state of evicted tokens: feature maps of keys times values, summed, with entropy-guided decay."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from retention.memory.base import Evicted, MemoryConfig, MemoryLayer, State, wide
from retention.memory.features import FEATURE_MAPS, FeatureMap
from retention.ops.entropy import ENTROPIES, observers_of, retention_score
from retention.ops.recurrence import decayed_sum, delta_rule
from retention.ops.spatial import geometric_log_gammas, root_places, spatial_decay
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

    With `N = sum_b exp(c_b) phi_q(q)^T S_b` and `Z` likewise, the readout `joint` takes `lse_M = log Z` and
    `o_M = N / Z`; same family as LESS (arXiv 2402.09398) and LoLCATs (2410.10254). The transition, the readouts `gated`
    and `paper` and the spatial decay are reconstructions of RetentiveKV (arXiv 2605.04075).
    """

    name = "linear"
    trained = True

    features: int = 16
    """Features per head: the state weighs `4 (features x head_dim + features)` bytes per bank."""
    hidden: int = 64
    """Width of the feature maps' hidden layer."""
    feature_map: str = "mlp"
    """mlp (softplus of a two-layer map), hedgehog (softmax of a linear map and of its negative), elu1, or identity."""
    readout: str = "joint"
    """joint (weight = estimated missing mass), gated (one learned weight per head; an ablation) or paper (a normalised
    sum on top of the output, whose text part is weighted by how undecided the query is among the patches held)."""
    transition: str = "step"
    """step (the less entropy a token has, the more the state forgets at it), paper (`eta = sigmoid(w h + b)`, weight =
    attention, no normaliser), delta (gated delta rule, no normaliser) or none (a plain sum)."""
    text_decay: str = "step"
    """step (the text bank forgets as the transition says) or none."""
    vision_decay: str = "none"
    """The same for the vision bank."""
    tau: float = 0.0
    """Evicted text joins only above this entropy; 0 is all of it."""
    entropy: str = "across_queries"
    """across_queries, across_heads or pointwise; `ops.entropy` says what they measure."""
    spatial: bool = False
    """Patches join the vision bank with a weight that falls with the distance from their image's root."""
    root: str = "score"
    """score (the patch of largest retention score) or center."""
    gamma: str = "geometric"
    """geometric (one decay per head, fixed) or learned (one per head and axis, starting there)."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("feature_map", FEATURE_MAPS),
            ("readout", ("joint", "gated", "paper")),
            ("transition", ("step", "paper", "delta", "none")),
            ("text_decay", ("step", "none")),
            ("vision_decay", ("step", "none")),
            ("entropy", ENTROPIES),
            ("root", ("score", "center")),
            ("gamma", ("geometric", "learned")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"expected memory.{name} among {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.features < 2 or self.features % 2 or self.hidden < 1:
            raise ValueError(
                f"expected an even memory.features of at least 2 and memory.hidden of at least 1, got {self.features} "
                f"and {self.hidden}"
            )
        readouts = {"paper": ("paper",), "delta": ("gated", "paper")}.get(self.transition)
        if readouts is not None and self.readout not in readouts:
            raise ValueError(
                f"expected memory.readout {' or '.join(readouts)} with memory.transition={self.transition}, which keeps "
                f"no normaliser, got {self.readout!r}"
            )
        if (self.transition == "paper") != (self.feature_map == "identity"):
            raise ValueError(
                "expected memory.feature_map=identity exactly with memory.transition=paper, got "
                f"{self.feature_map!r} with {self.transition!r}: negative features have no normaliser"
            )

    @property
    def collectors(self) -> tuple[str, ...]:
        """Rows of the queries that tell entropy and attention."""
        return (observers_of(self.entropy),)

    @property
    def placed(self) -> bool:
        """Where the weight of a patch falls with its distance from the root."""
        return self.spatial

    @property
    def normalised(self) -> bool:
        """Whether a state of features alone is kept, to divide by."""
        return self.transition in ("step", "none") and self.readout != "paper"

    def build(self, shape: ModelShape) -> "LinearLayer":
        """Feature maps and transition of one layer."""
        return LinearLayer(self, shape.num_kv_heads, shape.head_dim)


class LinearLayer(MemoryLayer):
    """Transition and readout of one layer, fp32."""

    def __init__(self, config: Linear, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.kv_heads, self.head_dim = config, kv_heads, head_dim
        self.entropy, self.reads_doubt = config.entropy, config.readout == "paper"
        self.features = head_dim if config.feature_map in ("elu1", "identity") else config.features
        sizes = config.feature_map, config.features, config.hidden, kv_heads, head_dim
        self.of_key, self.of_query = FeatureMap(*sizes), FeatureMap(*sizes)

        def scalars(value: float) -> nn.Parameter:
            return nn.Parameter(torch.full((kv_heads, 1), value))

        forgets = math.log(2) / HALF_LIFE
        if config.transition in ("step", "delta"):
            step = math.log(math.expm1(forgets))
            self.step_entropy, self.step_bias, self.rate = scalars(-5.0), scalars(step), scalars(math.log(math.e - 1))
        if config.transition == "paper":
            self.retain_entropy, self.retain_bias = scalars(1.0), scalars(-math.log(math.expm1(forgets)))
        else:
            start = 4.0 if config.transition == "delta" else math.log(math.e - 1)
            self.weight_attention, self.weight_bias = scalars(0.0), scalars(start)
        self.log_scale = nn.Parameter(torch.zeros(BANKS, kv_heads))
        self.gate = scalars(-4.0) if config.readout == "gated" else None
        if config.readout == "paper":
            self.gain, self.doubt_weight, self.doubt_bias = scalars(0.0), scalars(1.0), scalars(0.0)
        decays = -geometric_log_gammas(kv_heads).expand(3, -1)
        learned = config.spatial and config.gamma == "learned"
        self.distance = nn.Parameter(torch.expm1(decays).log()) if learned else None
        self.register_buffer("fixed_decays", decays.clone(), persistent=False)

    def empty(self, batch: int, device: torch.device) -> State:
        """Zeros: banks of `[features, value_dim]` and `[features]`, and how many tokens each absorbed."""
        shape = (batch, self.kv_heads, BANKS)
        sizes = {"sum": (*shape, self.features, self.head_dim), "norm": (*shape, self.features), "count": shape}
        return {
            name: torch.zeros(size, device=device)
            for name, size in sizes.items()
            if name != "norm" or self.config.normalised
        }

    def log_eta(self, entropy: Float[Tensor, "batch kv_heads n"]) -> Float[Tensor, "batch kv_heads n"]:
        """Log retention of the state per absorbed token: a widely attended token (high entropy) makes a small step."""
        if self.config.transition == "none":
            return torch.zeros_like(entropy)
        if self.config.transition == "paper":
            return F.logsigmoid(self.retain_entropy * entropy + self.retain_bias).clamp(min=LOG_ETA_MIN)
        step = F.softplus(F.softplus(self.step_entropy) * (1 - entropy) + self.step_bias)
        return (-F.softplus(self.rate) * step).clamp(min=LOG_ETA_MIN)

    def weight(self, evicted: Evicted) -> Float[Tensor, "batch kv_heads n"]:
        """How much of each token joins, by the attention it received and, for patches, its distance from the root."""
        attention = evicted.attention
        if self.config.transition != "paper":
            squash = torch.sigmoid if self.config.transition == "delta" else F.softplus
            attention = squash(self.weight_attention * attention + self.weight_bias)
        if not self.config.spatial or evicted.places is None:
            return attention
        score = retention_score(evicted.entropy, evicted.attention, 0.5)
        decays = self.fixed_decays if self.distance is None else F.softplus(self.distance)
        assert isinstance(decays, Tensor)
        near = spatial_decay(evicted.places, root_places(evicted.places, score, self.config.root), -decays)
        return attention * torch.where(evicted.visual, near, 1.0)

    def absorb(self, state: State, evicted: Evicted) -> State:
        """All at once, in the order of positions, each bank what is its own."""
        if not evicted.mask.shape[-1]:
            return state
        phi, values, weight = self.of_key(wide(evicted.keys)), wide(evicted.values), self.weight(evicted)
        rule = delta_rule if self.config.transition == "delta" else decayed_sum
        phi = F.normalize(phi, dim=-1) if rule is delta_rule else phi
        text = ~evicted.visual & (evicted.entropy >= self.config.tau)
        fresh: dict[str, list[Tensor]] = {name: [] for name in state}
        for bank, (mine, decay) in enumerate(
            ((evicted.visual, self.config.vision_decay), (text, self.config.text_decay))
        ):
            joins = mine & evicted.mask
            log_eta = self.log_eta(evicted.entropy) * joins if decay == "step" else torch.zeros_like(weight)
            fresh["sum"].append(rule(state["sum"][:, :, bank], phi, values, weight * joins, log_eta))
            if "norm" in state:
                ones = torch.ones_like(values[..., :1])
                norm = decayed_sum(state["norm"][:, :, bank, :, None], phi, ones, weight * joins, log_eta)
                fresh["norm"].append(norm[..., 0])
            fresh["count"].append(state["count"][:, :, bank] + joins.sum(-1))
        return {name: torch.stack(parts, 2) for name, parts in fresh.items()}

    def banks(
        self, state: State, query: Float[Tensor, "batch kv_heads queries head_dim"]
    ) -> tuple[
        Float[Tensor, "batch kv_heads queries features"], Float[Tensor, "batch kv_heads banks features value_dim"]
    ]:
        """Features of the queries, and both banks, scaled."""
        phi = self.of_query(query)
        phi = F.normalize(phi, dim=-1) if self.config.transition == "delta" else phi
        return phi, self.log_scale.exp().T[None, :, :, None, None] * state["sum"]

    def estimate(
        self, state: State, query: Float[Tensor, "batch kv_heads queries head_dim"], scaling: float
    ) -> tuple[Float[Tensor, "batch kv_heads queries value_dim"], Float[Tensor, "batch kv_heads queries"]]:
        """Banks summed, each with its learned scale; without a normaliser the sum itself, with a mass of 1."""
        phi, sums = self.banks(state, query)
        total = phi @ sums.sum(2)
        some = (state["count"].sum(2) > 0)[..., None].expand(total.shape[:3])
        if "norm" not in state:
            return total, torch.where(some, 0.0, float("-inf")).to(total.dtype)
        scale = self.log_scale.exp().T[None, :, :, None]
        mass = (phi @ (scale * state["norm"]).sum(2)[..., None])[..., 0]
        safe = torch.where(some, mass, 1.0).clamp(min=1e-20)
        return total / safe[..., None], torch.where(some, safe.log(), float("-inf"))

    def read(
        self,
        state: State,
        query: Float[Tensor, "batch heads queries head_dim"],
        out: Float[Tensor, "batch heads queries value_dim"],
        lse: Float[Tensor, "batch heads queries"],
        scaling: float,
        doubt: Float[Tensor, "batch heads queries"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
        """As every memory; what keeps no normaliser knows no mass."""
        if self.config.readout == "paper":
            return self.on_top(state, query, out, doubt), lse
        mixed, total = super().read(state, query, out, lse, scaling)
        return mixed, total if "norm" in state else lse

    def on_top(
        self,
        state: State,
        query: Float[Tensor, "batch heads queries head_dim"],
        out: Float[Tensor, "batch heads queries value_dim"],
        doubt: Float[Tensor, "batch heads queries"] | None,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """`o_R + gain RMSNorm(N_V + g N_T)`, `g = sigmoid(w doubt + b)` (gain and norm are reconstructions)."""
        groups, queries = out.shape[1] // self.kv_heads, out.shape[2]
        phi, sums = self.banks(state, rearrange(wide(query), "b (h g) q d -> b h (g q) d", g=groups))
        seen = torch.zeros(out.shape[:3], device=out.device, dtype=phi.dtype) if doubt is None else doubt.to(phi.dtype)
        open_ = torch.sigmoid(self.doubt_weight * rearrange(seen, "b (h g) q -> b h (g q)", g=groups) + self.doubt_bias)
        total = phi @ sums[:, :, 0] + open_[..., None] * (phi @ sums[:, :, 1])
        normed = total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        added = rearrange(self.gain[None, ..., None] * normed, "b h (g q) d -> b (h g) q d", q=queries)
        some = (state["count"].sum(2) > 0).repeat_interleave(groups, 1)[..., None, None]
        return torch.where(some, (wide(out) + added).to(out.dtype), out)

    def mix(self, out: Tensor, lse: Tensor, recalled: Tensor, mass: Tensor) -> Tensor:
        """Joint by default; the ablation mixes by one learned weight per head, whatever is missing."""
        if self.gate is None:
            return super().mix(out, lse, recalled, mass)
        groups = out.shape[1] // self.kv_heads
        weight = self.gate.repeat_interleave(groups, 0)[None].expand(mass.shape)
        return super().mix(out, torch.zeros_like(lse), recalled, torch.where(torch.isfinite(mass), weight, mass))
