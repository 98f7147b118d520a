"""How large values are behind the output projection of their query heads: what an entry can do to the hidden states."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from retention.ops.blocks import BLOCK


def l1_output_norms(
    values: Float[Tensor, "batch kv_heads keys value_dim"], output: Float[Tensor, "hidden features"]
) -> Float[Tensor, "batch kv_heads keys"]:
    """L1 norm of each value behind the output projection of its query heads, averaged over the group; in blocks."""
    weights = rearrange(output.float(), "o (h g d) -> g h d o", h=values.shape[1], d=values.shape[3])
    blocks = values.float().split(BLOCK, 2)
    return torch.cat([torch.stack([(x @ w).abs().sum(-1) for w in weights]).mean(0) for x in blocks], 2)


def naive_l2_output_norms(
    values: Float[Tensor, "batch kv_heads keys value_dim"], output: Float[Tensor, "hidden features"], heads: int
) -> Float[Tensor, "batch heads keys"]:
    """`|| W_O^(h) v ||_2` of every value in every query head of its group, fp32."""
    weight = rearrange(output.float(), "hidden (h d) -> h d hidden", h=heads)
    return (values.float().repeat_interleave(heads // values.shape[1], 1) @ weight).norm(dim=-1)


def l2_output_norms(
    values: Float[Tensor, "batch kv_heads keys value_dim"], output: Float[Tensor, "hidden features"], heads: int
) -> Float[Tensor, "batch heads keys"]:
    """The same through `W^T W` of each head, so that nothing of the model's width is held for every token."""
    weight = rearrange(output.float(), "hidden (h d) -> h hidden d", h=heads)
    wide = values.float().repeat_interleave(heads // values.shape[1], 1)
    squares = (wide @ (weight.transpose(-1, -2) @ weight) * wide).sum(-1)
    return squares.clamp(min=0).sqrt()
