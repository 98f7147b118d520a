"""DMS: eviction decisions that take effect some tokens later, trained through noise (arXiv 2506.05345)."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from retention.losses import Pair, distillation_terms
from retention.objectives.base import Attended, Collected, GatedCall, Objective, Step
from retention.ops.evicted_attention import delayed_attention
from retention.types import LossTerms, ModelShape, require


@dataclass
class DMS(Objective):
    """`loss = KL to the full cache + ratio_weight * max(0, (1 - 1 / ratio) - closed share)`.

    The score s is minus the published eviction logit. With logistic noise n, `s~ = (s + n) / temperature`, a key
    weighs `sigmoid(s~)` for queries more than `window` tokens behind it, and is closed where that is below a half,
    with the gradient of the soft weight. The ratio grows linearly from 1. Differs from the public code: forward KL
    at the scored labels; gates read the token itself, not the one behind it (for its linear gate, gate=trim_linear);
    the optimiser is the trainer's.
    """

    name: ClassVar[str] = "dms"
    score_kind: ClassVar[str] = "static"
    initial_score: ClassVar[float | None] = 5.0

    ratio: float = 16.0
    """Compression to reach: tokens per entry kept."""
    ramp: float = 0.94
    """Share of the run in which the ratio grows."""
    window: int = 512
    """Tokens for which an entry stays whatever was decided."""
    temperature: float = 0.1
    """Of the relaxed decisions."""
    ratio_weight: float = 1.0
    """Weight of the ratio's hinge."""

    def __post_init__(self) -> None:
        checks = (
            (self.ratio >= 1, "objective.ratio of at least 1", self.ratio),
            (0 < self.ramp <= 1, "objective.ramp above 0, at most 1", self.ramp),
            (self.window >= 0, "objective.window of 0 or more", self.window),
            (self.temperature > 0, "objective.temperature above 0", self.temperature),
            (self.ratio_weight >= 0, "objective.ratio_weight of 0 or more", self.ratio_weight),
        )
        require(checks)

    def attend(self, call: GatedCall, step: Step) -> Attended:
        """Delayed attention under this step's noise; the relaxed log weights are noted."""
        uniform = step.uniform(call.layer, call.score.shape).to(call.score.device)
        noise = torch.logit(uniform.clamp(1e-6, 1 - 1e-6))
        log_keep = F.logsigmoid((call.score + noise) / self.temperature)
        out = delayed_attention(
            call.queries,
            call.keys,
            call.values,
            log_keep,
            window=self.window,
            scaling=call.scaling,
            positions=call.positions,
            valid=call.mask,
            allowed=call.allowed,
        )
        return out, log_keep

    def closed(self, collected: Collected) -> tuple[Pair, Tensor]:
        """Hinge of each sequence's closed share, and the mean share; hard decisions with soft gradients."""
        keep = torch.stack(collected.noted).exp()
        soft = 1 - keep
        hard = (keep < 0.5).float() + soft - soft.detach()
        counted = collected.valid[None, :, None].expand_as(hard)
        share = (hard * counted).sum((0, 2, 3)) / counted.sum((0, 2, 3)).clamp(min=1)
        ratio = 1 + (self.ratio - 1) * min(1.0, collected.step.done / self.ramp)
        hinge = (1 - 1 / ratio - share).clamp(min=0)
        return (hinge.sum(), hinge.new_tensor(float(len(hinge)))), share.mean().detach()

    def counts(self, step: Step, valid: Bool[Tensor, "batch tokens"], shape: ModelShape) -> dict[str, float]:
        """Scored labels; sequences."""
        return {"kl": step.scored(), "ratio": float(len(valid))}

    def loss(self, collected: Collected) -> tuple[LossTerms, dict[str, Tensor]]:
        """Both terms; logged beside them: the share of closed entries."""
        assert collected.teacher is not None
        kl, _ = distillation_terms(collected.student, collected.teacher, collected.step.labels, collected.head)
        hinge, share = self.closed(collected)
        return LossTerms({"kl": kl, "ratio": hinge}, {"kl": 1.0, "ratio": self.ratio_weight}), {"closed": share}

    def describe(self) -> dict[str, object]:
        """The objective and its settings."""
        return {"objective": self.name, "score_kind": self.score_kind, **asdict(self)}
