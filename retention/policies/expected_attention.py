"""Expected attention: what queries still to come will attend to, judged by those of the prompt (arXiv 2510.00636)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.policies.base import Policy
from retention.policies.collect import EXPECTED
from retention.types import KVState


@dataclass
class ExpectedAttention(Policy):
    """`score = softmax over keys of (k . mu' / sqrt(d) + k Sigma' k / (2 d))`, group mean, times `||v||`.

    `mu` and `Sigma` are mean and covariance of a query head's queries before their rotation, the first 4 left out;
    `mu' = R mu`, `Sigma' = R Sigma R^T`, with R the mean rotation to the next 512 text positions. Blind to the question
    as long as it is not in the prompt. Published with the first 4 tokens kept: `cache.sink_size=4`.

    As published, `R Sigma R^T` is not the mean of the rotated covariances. Differs from the paper: moments are those
    of the newest forward, so of the newest chunk under `cache.prefill_chunk`.
    """

    collector = "query_moments"
    evicts_while_decoding = False

    use_covariance: bool = True
    """Counts the scatter of queries; false their mean alone."""
    use_vnorm: bool = True
    """Times the norm of the value."""

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Expected attention, fp32."""
        mean, spread = (self.observed(kv, name) for name in EXPECTED)
        logits = mean + spread if self.use_covariance else mean
        expected = logits.masked_fill(~kv.valid[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0).mean(2)
        return expected * kv.values.float().norm(dim=-1) if self.use_vnorm else expected
