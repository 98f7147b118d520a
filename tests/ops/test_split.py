"""The bfloat16 form of gated attention against float64, and the bound on its age term."""

import math

import pytest
import torch
from torch.nn import functional as F

from retention.ops import split
from retention.ops.attention import blocked_gated_attention, naive_gated_attention
from retention.ops.split import (
    QUERIES,
    STEEPEST,
    age_error,
    bf16_terms,
    fused_causal,
    split_dimensions,
    split_fits,
    split_gated_attention,
)
from tests.ops.test_attention import SCALING, draw, upto

NAMES = ("out", "dq", "dk", "dv", "dlog_beta")
NOISE = (1.0, 1.0, 1.0, 1.0, 0.6)
"""Relative errors in per cent; one bfloat16 rounding is 0.39."""


def halved(tokens, **options):
    q, k, v, log_beta = draw(tokens, **options)
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), log_beta


def truth(q, k, v, log_beta, *, scaling, positions, valid=None, documents=None):
    """Float64, with every pair of tokens written out."""
    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v, log_beta = (x.repeat_interleave(groups, 1) for x in (k, v, log_beta))
    sees = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()[None, None]
    if valid is not None:
        sees = sees & valid[:, None, None]
    if documents is not None:
        sees = sees & (documents[:, None, :, None] == documents[:, None, None])
    sees = sees | torch.eye(tokens, dtype=torch.bool, device=q.device)
    ages = (positions[:, None, :, None] - positions[:, None, None]).double()
    logits = scaling * q.double() @ k.double().mT + ages * log_beta.double()[:, :, None]
    return logits.masked_fill(~sees, float("-inf")).softmax(-1) @ v.double()


def found(form, inputs, rows=None, **options):
    """Output and gradients of a form, of the rows that count."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = form(*leaves, **options)
    rows = torch.ones(out.shape[0], out.shape[2], device=out.device) if rows is None else rows
    asked = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, torch.bfloat16)
    asked = asked * rows[:, None, :, None]
    grads = torch.autograd.grad(out, leaves, asked.to(out.dtype))
    return [(out * rows[:, None, :, None]).detach(), *grads]


def per_cent(inputs, rows=None, form=split_gated_attention, **options):
    """Relative errors of output and gradients against float64."""
    exact = found(truth, [x.double() for x in inputs], rows, **options)
    got = found(form, inputs, rows, **options)
    return [float(100 * (a.double() - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(got, exact, strict=True)]


def assert_at_the_noise(inputs, rows=None, **options):
    for name, error, limit in zip(NAMES, per_cent(inputs, rows, **options), NOISE, strict=True):
        assert error < limit, name


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 300, 600])
def test_values_and_gradients_are_those_of_float64_but_for_rounding(tokens, kv_heads):
    inputs = halved(tokens, kv_heads=kv_heads, seed=tokens, dim=16)
    assert_at_the_noise(inputs, scaling=0.25, positions=upto(tokens))


@pytest.mark.parametrize("strength", [1e-4, 0.01, 1.0, 8.0])
def test_at_any_speed_of_forgetting(strength):
    q, k, v, log_beta = halved(500, heads=2, kv_heads=1, batch=1, dim=16)
    assert_at_the_noise((q, k, v, strength * log_beta), scaling=0.25, positions=upto(500, 1))


def test_gradients_of_gates_are_better_than_those_of_a_bfloat16_bias():
    q, k, v, log_beta = halved(500, heads=2, kv_heads=1, batch=1, dim=16)
    options = {"scaling": 0.25, "positions": upto(500, 1)}
    biased = per_cent((q, k, v, log_beta), form=blocked_gated_attention, **options)
    assert 2 * per_cent((q, k, v, log_beta), **options)[4] < biased[4]


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (5, 5), (8, 8), (13, 13), (8, 24), (24, 8), (8, 17)])
def test_at_any_width(dim, value_dim):
    q, k, _, log_beta = halved(40, dim=dim)
    v = torch.randn(2, 2, 40, value_dim, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert_at_the_noise((q, k, v, log_beta), scaling=0.25, positions=upto(40))


@pytest.mark.parametrize("scaling", [2**-8, 1.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, scaling):
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[1, slice(0, 20) if side == "left" else slice(30, None)] = False
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    q, k, v, log_beta = halved(50, dim=8)
    k = k.masked_fill(~valid[:, None, :, None], 9.0)
    inputs = (q, k, v, log_beta)
    assert_at_the_noise(inputs, valid.float(), scaling=scaling, positions=positions, valid=valid)


def test_positions_with_gaps_and_offsets():
    g = torch.Generator().manual_seed(5)
    positions = torch.randint(1, 6, (2, 60), generator=g).cumsum(1) + torch.tensor([[0], [70_000]])
    assert_at_the_noise(halved(60, dim=8), scaling=0.25, positions=positions)


@pytest.mark.parametrize("padded", [False, True])
def test_long_rows_are_attended_in_calls_of_some_queries_each(monkeypatch, padded):
    monkeypatch.setattr(split, "QUERIES", 17)
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, :19] = not padded
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    options = {"scaling": 0.25, "positions": positions, "valid": valid if padded else None}
    assert_at_the_noise(halved(60, dim=8), valid.float(), **options)


def test_gates_that_forget_nothing_give_plain_attention():
    q, k, v, log_beta = halved(33)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING, enable_gqa=True)
    gated = split_gated_attention(q, k, v, torch.zeros_like(log_beta), scaling=SCALING, positions=upto(33))
    torch.testing.assert_close(gated, plain, rtol=0, atol=0.01)


@pytest.mark.parametrize("log_beta", [-20.0, -200.0, -math.inf])
def test_gates_that_forget_at_once_leave_each_token_only_itself(log_beta):
    q, k, v, like = halved(33)
    out = split_gated_attention(q, k, v, torch.full_like(like, log_beta), scaling=SCALING, positions=upto(33))
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=0, atol=0.01)


def test_it_agrees_with_the_naive_form():
    inputs, options = halved(33), {"scaling": SCALING, "positions": upto(33)}
    torch.testing.assert_close(
        split_gated_attention(*inputs, **options), naive_gated_attention(*inputs, **options), rtol=0.01, atol=0.02
    )


# --- the age term alone -----------------------------------------------------------------------------------------


def logits_of_one_key(at, span, log_beta, scaling, calls_from=0, products=True):
    """Logits that the kernel finds for one key, less `scaling q.k`, with the ages of the queries behind it.

    The log-sum-exp of attention to a single key is its logit.
    """
    g = torch.Generator().manual_seed(at)
    ages = torch.cat([torch.arange(40), torch.logspace(1, 5.2, 80).long()]).unique()
    t = (at + ages)[(at + ages < span) & (at + ages >= calls_from)]
    positions = torch.cat([torch.tensor([at, calls_from]), t, torch.tensor([span - 1])])[None]
    slope = torch.full((1, 1, positions.shape[1]), log_beta / scaling)
    more_q, more_k = split_dimensions(slope, positions, None, first=1, pad=0.0)
    q, k = (products * torch.randn(*shape, 16, generator=g).bfloat16() for shape in ((1, len(t)), (1, 1)))
    wide_q, wide_k = torch.cat([q, more_q[:, 1:-1]], -1), torch.cat([k, more_k[:, 0, :1]], -1)
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        wide_q[None], wide_k[None], wide_k[None], 0.0, False, scale=scaling
    )
    plain = scaling * (q.double() @ k.double().mT)[0, :, 0]
    return lse[0, 0].double() - plain, (t - at).double()


@pytest.mark.parametrize("half_life", [1, 10, 1_000, 100_000, 1_000_000])
@pytest.mark.parametrize("span", [256, 4_096, QUERIES, 131_072])
def test_the_age_term_stays_in_its_bound(span, half_life):
    log_beta = -math.log(2) / half_life
    worst = 0.0
    for at in (0, 1, span // 3, span // 2, span - 130, span - 2):
        found_terms, ages = logits_of_one_key(at, span, log_beta, 0.125)
        matters = -ages * log_beta <= 20
        worst = max(worst, float((found_terms - ages * log_beta)[matters].abs().max()))
    assert worst <= age_error(span, -log_beta)


def test_queries_far_behind_a_key_are_no_worse():
    """Of 131,072 tokens, the last call's queries: the key of a short life lies before all of them, one of a long life too."""
    for half_life, at in ((10, 131_072 - QUERIES - 50), (100_000, 5)):
        log_beta = -math.log(2) / half_life
        terms, ages = logits_of_one_key(at, 131_072, log_beta, 0.125, calls_from=131_072 - QUERIES)
        matters = -ages * log_beta <= 20
        assert matters.any()
        assert float((terms - ages * log_beta)[matters].abs().max()) <= age_error(QUERIES, -log_beta)


def test_terms_sum_to_the_number():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 6, 1000)
    for count, bits in ((1, 8), (2, 17), (3, 25)):
        rest = (sum(term.double() for term in bf16_terms(x, count)) - x.double()).abs() / x.double().abs()
        assert rest.max() <= 2.0**-bits * (1 + 2**-8)


def test_positions_of_131072_tokens_are_exact():
    positions = torch.arange(131_072)[None]
    more_q, _ = split_dimensions(torch.zeros(1, 1, 131_072), positions, None, first=0, pad=0.0)
    whole = more_q[0, :, 0].double() + more_q[0, :, 3].double()
    assert torch.equal(whole - whole[0], positions[0].double())


def test_fused_causal_lines_the_last_query_up_with_the_last_key():
    q, k, v, _ = draw(20)
    out, lse = fused_causal(q, k, v, SCALING)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING, enable_gqa=True)
    torch.testing.assert_close(out, plain)
    late, late_lse = fused_causal(q[:, :, 13:], k, v, SCALING)
    torch.testing.assert_close(late, plain[:, :, 13:])
    torch.testing.assert_close(late_lse, lse[:, :, 13:])


# --- where it is taken ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim", "capability", "fits"),
    [
        (torch.bfloat16, 128, 128, (8, 0), True),
        (torch.bfloat16, 128, 128, (9, 0), True),
        (torch.bfloat16, 128, 128, (7, 5), False),
        (torch.bfloat16, 248, 256, (9, 0), True),
        (torch.bfloat16, 256, 256, (9, 0), False),
        (torch.bfloat16, 64, 264, (9, 0), False),
        (torch.float16, 128, 128, (9, 0), False),
        (torch.float32, 128, 128, (9, 0), False),
    ],
)
def test_it_is_taken_for_bfloat16_of_widths_and_devices_with_flash_kernels(
    monkeypatch, dtype, head_dim, value_dim, capability, fits
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert split_fits(dtype, torch.device("cuda"), head_dim, value_dim) == fits
    assert not split_fits(dtype, torch.device("cpu"), head_dim, value_dim)


def test_one_call_is_as_accurate_as_a_bfloat16_rounding_of_log_beta():
    assert age_error(QUERIES, 1.0) <= 2**-8 + 2**-19
    assert age_error(131_072, 1.0) > 2**-7
    assert age_error(QUERIES, STEEPEST) < 2**-3.9


def test_slopes_and_positions_outrun_float16():
    """The offset `t * log_beta / scaling` at 64k tokens of a fast gate, and the slope of a slow one."""
    assert torch.finfo(torch.float16).max < 65_536 * 1.0 / 0.0884
    assert math.log(2) / 1e6 / 0.0884 < torch.finfo(torch.float16).tiny
