"""Gated attention: the fused form against the naive one, and the naive one against plain mathematics."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from retention.ops import blocks
from retention.ops.attention import augmented_gated_attention, blocked_gated_attention, naive_gated_attention
from retention.ops.evicted_attention import delayed_attention, naive_delayed_attention
from retention.ops.logits import Scaling

FORMS = [naive_gated_attention, augmented_gated_attention]
SCALING = 0.31


def draw(tokens, heads=4, kv_heads=2, batch=2, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, tokens, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, generator=g) for _ in range(2))
    log_beta = -torch.rand(batch, kv_heads, tokens, generator=g)
    return q, k, v, log_beta


def upto(tokens, batch=2):
    return torch.arange(tokens).expand(batch, -1)


def both_ways(inputs, rows, **options):
    """Output and gradients of each form; `rows` [batch, tokens] are the queries that count."""
    found = []
    for form in FORMS:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = form(*leaves, scaling=SCALING, **options)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) * rows[:, None, :, None]
        grads = torch.autograd.grad(out, leaves, cotangent)
        found.append([(out * rows[:, None, :, None]).detach(), *grads])
    return found


def assert_same(inputs, rows, **options):
    naive, fused = both_ways(inputs, rows, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dlog_beta"), naive, fused, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5 * float(a.abs().max().clamp(min=1)), msg=name)


def float64_reference(q, k, v, log_beta, positions):
    groups = q.shape[1] // k.shape[1]
    q, k, v, log_beta = (x.double() for x in (q, k, v, log_beta))
    k, v, log_beta = (x.repeat_interleave(groups, 1) for x in (k, v, log_beta))
    out = torch.zeros_like(q)
    for t in range(q.shape[2]):
        ages = (positions[:, t, None] - positions[:, : t + 1]).double()[:, None]
        logits = SCALING * torch.einsum("bhd,bhkd->bhk", q[:, :, t], k[:, :, : t + 1]) + ages * log_beta[:, :, : t + 1]
        out[:, :, t] = torch.einsum("bhk,bhkd->bhd", logits.softmax(-1), v[:, :, : t + 1])
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_fused_equals_naive_in_values_and_gradients(tokens, kv_heads):
    inputs = draw(tokens, heads=4, kv_heads=kv_heads, seed=tokens)
    assert_same(inputs, torch.ones(2, tokens), positions=upto(tokens))


@pytest.mark.parametrize("dim", [1, 5, 6, 8, 13])
def test_fused_equals_naive_at_any_head_width(dim):
    assert_same(draw(9, dim=dim), torch.ones(2, 9), positions=upto(9))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_fused_equals_naive_on_the_real_rows_of_padded_batches(side, kv_heads):
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[1, slice(0, 5) if side == "left" else slice(8, None)] = False
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    assert_same(draw(13, kv_heads=kv_heads), valid.float(), positions=positions, valid=valid)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gives_what_the_row_gives_alone(form, side):
    inputs = draw(13, batch=1)
    pad = (4, 0) if side == "left" else (0, 4)
    padded = [F.pad(x, (0, 0, *pad), value=3.0) for x in inputs[:3]] + [F.pad(inputs[3], pad, value=-0.5)]
    valid = F.pad(torch.ones(1, 13, dtype=torch.bool), pad)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    alone = form(*inputs, scaling=SCALING, positions=upto(13, 1))
    among = form(*padded, scaling=SCALING, positions=positions, valid=valid)
    torch.testing.assert_close(among[:, :, valid[0]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value_dim", [1, 6, 11, 20])
def test_values_may_have_a_width_of_their_own(value_dim):
    q, k, _, log_beta = draw(9)
    v = torch.randn(2, 2, 9, value_dim, generator=torch.Generator().manual_seed(2))
    assert_same((q, k, v, log_beta), torch.ones(2, 9), positions=upto(9))


def test_fused_equals_naive_at_positions_with_gaps_and_offsets():
    g = torch.Generator().manual_seed(5)
    positions = torch.randint(1, 6, (2, 11), generator=g).cumsum(1) + torch.tensor([[0], [200]])
    assert_same(draw(11), torch.ones(2, 11), positions=positions)


@pytest.mark.parametrize("form", FORMS)
def test_only_differences_of_positions_matter(form):
    inputs = draw(8)
    near, far = (form(*inputs, scaling=SCALING, positions=upto(8) + shift) for shift in (0, 5000))
    torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_gates_that_forget_nothing_give_plain_causal_attention(form, kv_heads):
    q, k, v, log_beta = draw(17, kv_heads=kv_heads)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING, enable_gqa=True)
    gated = form(q, k, v, torch.zeros_like(log_beta), scaling=SCALING, positions=upto(17))
    torch.testing.assert_close(gated, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gates_that_forget_at_once_leave_each_token_only_itself(form):
    q, k, v, log_beta = draw(9)
    out = form(q, k, v, torch.full_like(log_beta, -200.0), scaling=SCALING, positions=upto(9))
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_decay_multiplies_the_weight_not_the_logit(form):
    q, k, v, log_beta = draw(10, heads=2, kv_heads=2)
    ages = (upto(10)[:, :, None] - upto(10)[:, None]).tril()[:, None]
    beta_to_age = torch.exp(ages * log_beta[:, :, None])
    logits = SCALING * q @ k.transpose(-1, -2)
    causal = torch.ones(10, 10).tril()

    def attend(weights):
        weights = weights * causal
        return weights / weights.sum(-1, keepdim=True) @ v

    out = form(q, k, v, log_beta, scaling=SCALING, positions=upto(10))
    torch.testing.assert_close(out, attend(beta_to_age * logits.exp()), rtol=1e-4, atol=1e-5)
    assert (out - attend((beta_to_age * logits).exp())).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_token_sees_nothing_that_comes_later(form):
    q, k, v, log_beta = draw(9)
    out = form(q, k, v, log_beta, scaling=SCALING, positions=upto(9))
    for x in (q, k, v, log_beta):
        x[:, :, 6:] = -x[:, :, 6:].flip(2) - 1.0
    changed = form(q, k, v, log_beta.clamp(max=0), scaling=SCALING, positions=upto(9))
    torch.testing.assert_close(changed[:, :, :6], out[:, :, :6], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed[:, :, 6:], out[:, :, 6:], atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [0.01, 1.0, 8.0])
def test_error_against_float64_stays_below_eps_times_tokens_times_log_beta(form, strength):
    q, k, v, log_beta = draw(257, heads=2, kv_heads=1, batch=1, seed=3)
    log_beta = strength * log_beta
    exact = float64_reference(q, k, v, log_beta, upto(257, 1))
    error = (form(q, k, v, log_beta, scaling=SCALING, positions=upto(257, 1)).double() - exact).abs().max()
    eps = torch.finfo(torch.float32).eps
    assert error < eps * (20 + 2 * 257 * strength)


@pytest.mark.parametrize("form", FORMS)
def test_output_has_the_dtype_of_the_queries(form):
    q, k, v, log_beta = draw(5)
    half = form(q.bfloat16(), k.bfloat16(), v.bfloat16(), log_beta, scaling=SCALING, positions=upto(5))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.float(), form(q, k, v, log_beta, scaling=SCALING, positions=upto(5)), rtol=0.05, atol=0.05
    )


def images_in(tokens, batch=2):
    """Causal, but tokens 3 to 6 and 8 to 10 see each other; the first column of row 1 is padding."""
    blocks = torch.full((tokens,), -1)
    blocks[3:7], blocks[8:11] = 0, 1
    same = (blocks[:, None] == blocks) & (blocks >= 0)
    allowed = (torch.ones(tokens, tokens, dtype=torch.bool).tril() | same).expand(batch, 1, -1, -1).clone()
    allowed[1, :, :, 0] = False
    return allowed


def by_hand(q, k, v, log_beta, allowed, cap):
    """Keys ahead do not decay; the cap comes before the decay."""
    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    out = torch.zeros_like(q)
    for b, h, t in ((b, h, t) for b in range(len(q)) for h in range(q.shape[1]) for t in range(tokens)):
        seen = [i for i in range(tokens) if allowed[b, 0, t, i] or i == t]
        logits = torch.stack([SCALING * q[b, h, t] @ k[b, h // groups, i] for i in seen])
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        decays = torch.stack([max(0, t - i) * log_beta[b, h // groups, i] for i in seen])
        weights = (logits + decays).softmax(0)
        out[b, h, t] = sum(w * v[b, h // groups, i] for w, i in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("cap", [None, 0.7])
def test_masks_that_are_not_causal_and_caps(cap, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 5)
    inputs, allowed, scaling = draw(13), images_in(13), Scaling(SCALING, cap)
    options = {"scaling": scaling, "positions": upto(13), "allowed": allowed}
    expected, found = by_hand(*inputs, allowed, cap), []
    for form in (naive_gated_attention, blocked_gated_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = form(*leaves, **options)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_without_a_mask_blocks_are_the_causal_form(cap, packed, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    inputs, valid = draw(11), torch.ones(2, 11, dtype=torch.bool)
    valid[1, :3] = False
    options = {"scaling": Scaling(SCALING, cap), "positions": upto(11), "valid": valid}
    options["documents"] = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2]).expand(2, -1) if packed else None
    naive, blocked = (form(*inputs, **options) for form in (naive_gated_attention, blocked_gated_attention))
    torch.testing.assert_close(blocked[0], naive[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(blocked[1, :, 3:], naive[1, :, 3:], rtol=1e-5, atol=1e-5)


def test_delayed_attention_reads_the_mask_too(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 5)
    q, k, v, log_keep = draw(13)
    allowed, options = images_in(13), {"scaling": SCALING, "positions": upto(13), "window": 2}
    naive = naive_delayed_attention(q, k, v, log_keep, allowed=allowed, **options)
    torch.testing.assert_close(delayed_attention(q, k, v, log_keep, allowed=allowed, **options), naive)
    blind = naive_delayed_attention(q, k, v, log_keep, **options)
    assert not torch.allclose(naive[0, :, 3:6], blind[0, :, 3:6], atol=1e-3)
    torch.testing.assert_close(naive[0, :, 11:], blind[0, :, 11:])


def test_a_scaling_is_a_number_that_survives_copies():
    scaling = Scaling(0.25, 50.0)
    assert scaling == 0.25
    for twin in (copy.deepcopy(scaling), pickle.loads(pickle.dumps(scaling))):
        assert (float(twin), twin.softcap) == (0.25, 50.0)
