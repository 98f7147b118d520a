"""Fast KVzip: highest predicted attention (arXiv 2601.17668)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from retention.policies.static import StaticPolicy
from retention.types import KVState


@dataclass
class FastKVzip(StaticPolicy):
    """`score = sigmoid` of the gate's score, in log, one pool of layers and heads; the newest 4,096 stay.

    They are at most an eighth of the budget. The paper also keeps the first 4 tokens: `cache.sink_size=4`.
    """

    allocator = "global"
    selector = "global"
    gates_of = "fastkvzip"

    recent_size: int = 4096
    """Newest entries that stay, inside the budget."""

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Log of the predicted attention, fp32: ranks as the prediction in [0, 1] does, without its ties near 0."""
        assert kv.log_beta is not None
        return kv.log_beta.float()
