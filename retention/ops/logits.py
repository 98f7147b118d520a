"""How attention logits are scaled, and capped where a model caps them."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


class Scaling(float):
    """The factor of attention logits, which also knows the cap of models that have one (Gemma 2)."""

    softcap: float | None

    def __new__(cls, factor: float, softcap: float | None = None) -> "Scaling":
        """`softcap * tanh(logits / softcap)` follows the scaling; None leaves logits as they are."""
        made = super().__new__(cls, factor)
        made.softcap = softcap
        return made

    def __getnewargs__(self) -> Any:
        return float(self), self.softcap


def softcap_of(scaling: float) -> float | None:
    """The cap that belongs to a scaling, if there is one."""
    return getattr(scaling, "softcap", None)


def capped(logits: Float[Tensor, "..."], scaling: float) -> Float[Tensor, "..."]:
    """Scaled logits with the cap that belongs to the scaling."""
    cap = softcap_of(scaling)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def grouped_logits(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads keys head_dim"],
    scaling: float,
) -> Float[Tensor, "batch kv_heads groups queries keys"]:
    """Logits of every query head with the keys of its group's head, scaled and capped, fp32."""
    grouped = rearrange(queries, "b (h g) q d -> b h g q d", h=keys.shape[1]).float()
    return capped(scaling * grouped @ keys.float().transpose(-1, -2)[:, :, None], scaling)
