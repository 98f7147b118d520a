"""KeyDiff: keys unlike the average key stay (arXiv 2504.15364)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from retention.policies.base import Policy
from retention.types import KVState


@dataclass
class KeyDiff(Policy):
    """`score = -cos(k, mean of the unit keys)`, per KV head over the valid cached keys."""

    collector = "keys_values"

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Negative cosine to the mean direction, fp32."""
        unit = F.normalize(kv.keys.float(), dim=-1) * kv.valid[..., None]
        anchor = unit.sum(-2, keepdim=True) / kv.valid.sum(-1)[..., None, None].clamp(min=1)
        return -F.cosine_similarity(kv.keys.float(), anchor, dim=-1)
