"""Gated attention by FlexAttention, uncompiled on the CPU: its values, and what it refuses."""

import pytest
import torch

from retention.ops.attention import naive_gated_attention
from retention.ops.flex import flex_gated_attention
from tests.ops.test_attention import SCALING, draw, upto
from tests.ops.test_split import truth

NUMBERS = torch.tensor([[0] * 5 + [1] * 8, [4] * 1 + [2] * 2 + [9] * 10])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_values_are_the_naive_ones(kv_heads, padded, packed):
    inputs, valid = draw(13, kv_heads=kv_heads), torch.ones(2, 13, dtype=torch.bool)
    valid[1, :4] = False
    options = {"scaling": SCALING, "positions": upto(13), "valid": valid if padded else None}
    options["documents"] = NUMBERS if packed else None
    out = flex_gated_attention(*inputs, **options)
    torch.testing.assert_close(out, naive_gated_attention(*inputs, **options), rtol=1e-4, atol=1e-5)


def test_bfloat16_and_blocks_beyond_one():
    q, k, v, log_beta = draw(200, heads=2, kv_heads=1, batch=1, dim=16)
    half = (q.bfloat16(), k.bfloat16(), v.bfloat16(), log_beta / 50)
    documents = (torch.arange(200) >= 130).long()[None]
    options = {"scaling": 0.25, "positions": upto(200, 1), "documents": documents}
    out = flex_gated_attention(*half, **options)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth(*half, **options), rtol=0, atol=0.02)


def test_gates_learn_where_nothing_else_does():
    q, k, v, log_beta = draw(13)
    found = []
    for form in (naive_gated_attention, flex_gated_attention):
        leaf = log_beta.clone().requires_grad_()
        out = form(q, k, v, leaf, scaling=SCALING, positions=upto(13), documents=NUMBERS)
        found += torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_gradients_ask_for_a_gpu(which):
    inputs = list(draw(5))
    inputs[which].requires_grad_()
    with pytest.raises(ValueError, match="expected CUDA tensors"):
        flex_gated_attention(*inputs, scaling=SCALING, positions=upto(5))
    with torch.no_grad():
        assert flex_gated_attention(*inputs, scaling=SCALING, positions=upto(5)).isfinite().all()
