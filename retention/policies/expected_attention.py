"""Expected attention: what queries still to come will attend to, judged by those of the prompt (arXiv 2510.00636)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from retention.policies.base import Policy
from retention.policies.collect import EXPECTED, SKIPPED
from retention.types import KVState

LARGEST = 30.0
"""Logit above which the first tokens, which no softmax counts, are all the same."""


@dataclass
class ExpectedAttention(Policy):
    """`score = softmax over keys of (k . mu' / sqrt(d) + k Sigma' k / (2 d))`, group mean, times `||v||`.

    `mu` and `Sigma` are mean and covariance of a query head's queries before their rotation, the first 4 left out;
    `mu' = R mu`, `Sigma' = R Sigma R^T`, with R the mean rotation to the next 512 text positions. Blind to the question
    as long as it is not in the prompt. The softmax is over all keys but the first 4; these are scored against the same
    sum. Published with them kept: `cache.sink_size=4`.

    As published, `R Sigma R^T` is not the mean of the rotated covariances. Differs from the paper: moments are those
    of the newest forward, so of the newest chunk under `cache.prefill_chunk`.
    """

    collector = "query_moments"
    evicts_while_decoding = False

    use_covariance: bool = True
    """Counts the scatter of queries; false their mean alone."""
    use_vnorm: bool = True
    """Times the norm of the value."""

    def without_value_norm(self) -> "ExpectedAttention":
        """Expected attention alone."""
        return replace(self, use_vnorm=False)

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Expected attention, fp32."""
        mean, spread = (self.observed(kv, name) for name in EXPECTED)
        logits = mean + spread if self.use_covariance else mean
        later = kv.valid & (kv.positions >= SKIPPED)
        counted = torch.where(later.any(-1, keepdim=True), later, kv.valid)[:, :, None]
        total = logits.masked_fill(~counted, float("-inf")).logsumexp(-1, keepdim=True)
        shares = (logits - total).clamp(max=LARGEST).exp().masked_fill(~kv.valid[:, :, None], 0.0)
        expected = shares.mean(2)
        return expected * kv.values.float().norm(dim=-1) if self.use_vnorm else expected
