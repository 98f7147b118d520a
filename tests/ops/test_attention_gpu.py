"""Gated attention in all its forms on a CUDA device, and in a training forward; not run by default (`make test-gpu`)."""

import pytest
import torch
from torch.nn import functional as F

from retention.ops.attention import augmented_gated_attention
from retention.ops.flex import flex_gated_attention
from retention.ops.gated import form_for, gated_attention
from retention.ops.split import QUERIES, age_error, fused_causal, split_dimensions, split_gated_attention
from tests.ops import test_age_gradient as apart
from tests.ops.test_split import per_cent

pytestmark = pytest.mark.gpu


def halved(tokens, *, heads=8, kv_heads=2, dim=128, half_life=100.0, batch=1):
    g = torch.Generator("cuda").manual_seed(tokens)
    kind = {"generator": g, "device": "cuda"}
    q = torch.randn(batch, heads, tokens, dim, **kind).bfloat16()
    k, v = (torch.randn(batch, kv_heads, tokens, dim, **kind).bfloat16() for _ in range(2))
    log_beta = -torch.rand(batch, kv_heads, tokens, **kind) / half_life
    return q, k, v, log_beta


def upto(tokens, batch=1):
    return torch.arange(tokens, device="cuda").expand(batch, -1)


@pytest.mark.parametrize("form", [split_gated_attention, flex_gated_attention])
@pytest.mark.parametrize("half_life", [1.0, 100.0, 10_000.0])
@pytest.mark.parametrize(("tokens", "dim"), [(300, 64), (1000, 128), (2048, 128), (700, 192)])
def test_half_precision_forms_are_float64_but_for_rounding(form, tokens, dim, half_life):
    inputs = halved(tokens, dim=dim, half_life=half_life)
    errors = per_cent(inputs, form=form, scaling=dim**-0.5, positions=upto(tokens))
    assert max(errors) < 1, errors


@pytest.mark.parametrize("form", [split_gated_attention, flex_gated_attention])
def test_padding(form):
    valid = torch.ones(2, 300, dtype=torch.bool, device="cuda")
    valid[1, :120] = False
    options = {"positions": (valid.cumsum(1) - 1).clamp(min=0), "valid": valid, "scaling": 128**-0.5}
    assert max(per_cent(halved(300, batch=2), valid.float(), form=form, **options)) < 1


def test_documents_in_flex():
    documents = (upto(500) // 130).int()
    errors = per_cent(
        halved(500), form=flex_gated_attention, scaling=128**-0.5, positions=upto(500), documents=documents
    )
    assert max(errors) < 1


@pytest.mark.parametrize("form", [augmented_gated_attention, flex_gated_attention])
def test_fp32_forms(form):
    inputs = [x.float() for x in halved(600, dim=64)]
    assert max(per_cent(inputs, form=form, scaling=0.125, positions=upto(600))) < 0.1


def test_the_flash_kernel_lines_the_last_query_up_with_the_last_key():
    q, k, v, _ = halved(900)
    out, lse = fused_causal(q, k, v, 0.1)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1, enable_gqa=True)
    torch.testing.assert_close(out, plain, rtol=0, atol=0.02)
    late, late_lse = fused_causal(q[:, :, 333:], k, v, 0.1)
    torch.testing.assert_close(late, plain[:, :, 333:], rtol=0, atol=0.02)
    torch.testing.assert_close(late_lse, lse[:, :, 333:], rtol=0, atol=0.01)


@pytest.mark.parametrize("span", [4096, QUERIES, 131_072])
@pytest.mark.parametrize("half_life", [1, 100, 100_000])
def test_the_age_term_stays_in_its_bound(span, half_life):
    """By the log-sum-exp of attention to one key: queries without content, so that logits are the age term."""
    log_beta, at, scaling = -0.693 / half_life, span // 2 - 77, 0.125
    ages = torch.cat([torch.arange(40), torch.logspace(1, 5, 60).long()]).unique()
    t = (at + ages)[at + ages < span]
    positions = torch.cat([torch.tensor([at, 0]), t, torch.tensor([span - 1])])[None].cuda()
    slope = torch.full((1, 1, positions.shape[1]), log_beta / scaling, device="cuda")
    more_q, more_k = split_dimensions(slope, positions, None, first=1, pad=0.0)
    wide_q, wide_k = F.pad(more_q[:, None, 1:-1], (64, 0)), F.pad(more_k[:, :, :1], (64, 0))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    lse = flash(wide_q, wide_k, wide_k, 0.0, False, scale=scaling)[1][0, 0, : len(t)].double().cpu()
    exact = (t - at) * log_beta
    matters = exact >= -20
    assert float((lse - exact)[matters].abs().max()) <= age_error(span, -log_beta)


@pytest.mark.parametrize("case", apart.CASES)
def test_the_gradient_kernel_is_float64s_gradient(case):
    from retention.ops.age_gradient_triton import age_gradient

    assert apart.error(age_gradient, case, device="cuda") <= 40


def test_long_rows_in_several_calls_are_the_fp32_form():
    inputs = halved(QUERIES + 3000, heads=2, kv_heads=1, dim=64, half_life=2000.0)
    options, found = {"scaling": 0.125, "positions": upto(QUERIES + 3000)}, []
    for form in (augmented_gated_attention, split_gated_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = form(*leaves, **options)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for exact, got in zip(*found, strict=True):
        assert (got.float() - exact.float()).norm() < 0.01 * exact.float().norm()


def test_nothing_as_large_as_tokens_by_tokens_is_held():
    tokens, inputs = 16_384, [x.requires_grad_() for x in halved(16_384, heads=4, kv_heads=1)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gated_attention(*inputs, scaling=0.1, positions=upto(tokens)).float().square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < tokens * tokens


def test_half_precision_takes_the_split_form():
    given = halved(16)[:3]
    assert form_for(*given, scaling=0.1) == "split"
    assert form_for(*(x.half() for x in given), scaling=0.1) == "augmented"


def test_gated_training_in_bfloat16_trains_as_in_float32():
    import retention as rt
    from retention.gates.trim import Trim
    from tests.tiny import tiny_qwen3

    prompt, grads = torch.randint(0, 90, (2, 200), generator=torch.Generator().manual_seed(0)).cuda(), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_qwen3().to("cuda", dtype).requires_grad_(False)
        torch.manual_seed(0)
        gates = rt.RetentionGates(Trim(init_half_life=20.0), rt.RetentionGates.for_model(Trim(), model).shape).cuda()
        with rt.attach_gates(model, gates):
            model(input_ids=prompt, use_cache=False).logits.float().square().mean().backward()
        grads[dtype] = torch.cat([p.grad.float().flatten() for p in gates.parameters()])
    one, two = grads.values()
    assert F.cosine_similarity(one, two, dim=0) > 0.98
