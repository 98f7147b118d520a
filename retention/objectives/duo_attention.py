"""DuoAttention: which heads need the whole context, and which do with sinks and recent tokens (arXiv 2410.10819)."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from retention.losses import hidden_distance
from retention.objectives.base import Attended, Collected, GatedCall, Objective, Step, decaying
from retention.ops.evicted_attention import delayed_attention
from retention.types import LossTerms, ModelShape, require


@dataclass
class DuoAttention(Objective):
    """`out = a * full + (1 - a) * streaming` per KV head; `loss = ||h_full - h_mixed||^2 + sparsity_weight * mean a`.

    `a` is the sigmoid of the head's score (gate=per_head), h the final hidden state at scored labels. Differs from
    the public code: a is a sigmoid instead of a clamped number, and starts at 0.95 instead of 1; the optimiser is the
    trainer's, where trainer.offset_lr is the rate of the heads' scores.
    """

    name: ClassVar[str] = "duo_attention"
    score_kind: ClassVar[str] = "static"
    gate: ClassVar[str | None] = "per_head"
    initial_score: ClassVar[float | None] = 3.0

    sinks: int = 128
    """First tokens that streaming heads see."""
    recent_size: int = 256
    """Newest tokens that streaming heads see, the query's own included."""
    sparsity_weight: float = 0.05
    """Weight of the mean of a."""

    def __post_init__(self) -> None:
        checks = (
            (self.sinks >= 0, "objective.sinks of 0 or more", self.sinks),
            (self.recent_size >= 1, "objective.recent_size of at least 1", self.recent_size),
            (self.sparsity_weight >= 0, "objective.sparsity_weight of 0 or more", self.sparsity_weight),
        )
        require(checks)

    def attend(self, call: GatedCall, step: Step) -> Attended:
        """Full and streaming attention, mixed head by head."""
        sink = (call.positions < self.sinks)[:, None].expand_as(call.score)
        streaming = delayed_attention(
            call.queries,
            call.keys,
            call.values,
            torch.zeros_like(call.score).masked_fill(~sink, float("-inf")).detach(),
            window=self.recent_size - 1,
            scaling=call.scaling,
            positions=call.positions,
            valid=call.mask,
            allowed=call.allowed,
        )
        full = decaying(call, torch.zeros_like(call.log_beta))
        share = call.score.sigmoid().repeat_interleave(call.queries.shape[1] // call.keys.shape[1], 1)[..., None]
        return (share * full + (1 - share) * streaming).to(call.queries.dtype), None

    def counts(self, step: Step, valid: Bool[Tensor, "batch tokens"], shape: ModelShape) -> dict[str, float]:
        """Scored labels; heads, which are the same in every batch."""
        return {"distance": step.scored(), "sparsity": float(shape.num_layers * shape.num_kv_heads)}

    def loss(self, collected: Collected) -> tuple[LossTerms, dict[str, Tensor]]:
        """Both terms; logged beside them: the share of heads that keep everything."""
        assert collected.teacher is not None
        distance = hidden_distance(collected.student, collected.teacher, collected.step.labels)
        shares = torch.stack([score[0, :, 0] for score in collected.score]).sigmoid()
        sparsity = (shares.sum(), shares.new_tensor(float(shares.numel())))
        weights = {"distance": 1.0, "sparsity": self.sparsity_weight}
        figures = {"full_heads": (shares > 0.5).float().mean()}
        return LossTerms({"distance": distance, "sparsity": sparsity}, weights), figures

    def describe(self) -> dict[str, object]:
        """The objective and its settings."""
        return {"objective": self.name, "score_kind": self.score_kind, **asdict(self)}
