"""Expected cache size: sampled against exact, and the estimator's mean."""

import pytest
import torch

from retention.ops import capacity
from retention.ops.capacity import (
    every_query,
    expected_size,
    naive_expected_size,
    naive_expected_size_at,
    sample_queries,
)


def draw(batch=2, kv_heads=3, tokens=14, seed=0):
    return -torch.rand(batch, kv_heads, tokens, generator=torch.Generator().manual_seed(seed))


def upto(tokens, batch=2):
    return torch.arange(tokens).expand(batch, -1)


def dense64(log_beta):
    """`sum over i <= t of beta_i ** (t - i)` in float64, term by term."""
    log_beta = log_beta.double()
    sizes = [sum(torch.exp((t - i) * log_beta[..., i]) for i in range(t + 1)) for t in range(log_beta.shape[-1])]
    return torch.stack(sizes, -1)


def test_naive_size_is_the_sum_of_decayed_retentions():
    log_beta = draw()
    torch.testing.assert_close(
        naive_expected_size(log_beta, torch.arange(14)), dense64(log_beta).float(), rtol=1e-5, atol=1e-5
    )


def test_size_at_all_queries_equals_naive():
    log_beta, positions = draw(), upto(14)
    sampled = expected_size(log_beta, positions, positions)
    torch.testing.assert_close(sampled, naive_expected_size(log_beta, torch.arange(14)))


def test_size_at_chosen_queries_is_read_off_the_exact_size():
    log_beta, queries = draw(), torch.tensor([[2, 13, 7], [0, 5, 5]])
    exact = naive_expected_size(log_beta, torch.arange(14))
    expected = torch.stack([exact[row][:, queries[row]] for row in range(2)])
    torch.testing.assert_close(expected_size(log_beta, upto(14), queries), expected)


def test_nothing_forgotten_counts_every_token():
    found = expected_size(torch.zeros(2, 3, 14), upto(14), upto(14))
    assert torch.equal(found, (upto(14) + 1.0)[:, None].expand(2, 3, 14))


@pytest.mark.parametrize("log_beta", [-1e3, -1e30])
def test_all_forgotten_counts_only_the_newest_token(log_beta):
    found = expected_size(torch.full((2, 3, 14), log_beta), upto(14), upto(14))
    assert torch.equal(found, torch.ones(2, 3, 14))


def test_size_lies_between_one_and_all_tokens_so_far():
    found = expected_size(draw(), upto(14), upto(14))
    assert (found >= 1).all()
    assert (found <= upto(14)[:, None] + 1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side):
    log_beta, queries = draw(), torch.tensor([[1, 6, 9], [3, 8, 9]])
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[:, slice(0, 4) if side == "left" else slice(10, None)] = False
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    alone = expected_size(log_beta[:, :, valid[0]], upto(10), queries)
    torch.testing.assert_close(expected_size(log_beta, positions, queries, valid), alone)


def test_gradient_equals_dense_float64():
    log_beta, queries = draw(), torch.tensor([[2, 13, 7], [0, 5, 11]])
    weights = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(1))
    ours = log_beta.clone().requires_grad_()
    (weights * expected_size(ours, upto(14), queries)).sum().backward()
    truth = log_beta.double().requires_grad_()
    exact = dense64(truth)
    picked = torch.stack([exact[row][:, queries[row]] for row in range(2)])
    (weights.double() * picked).sum().backward()
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_each_stratum_gives_one_query_past_the_budget():
    for seed in range(50):
        chosen = sample_queries(torch.tensor([103]), torch.tensor([4.0]), 9, torch.Generator().manual_seed(seed))
        strata = (chosen - 4) // 11
        assert strata.tolist() == [list(range(9))]


def test_as_many_queries_as_eligible_positions_take_each_once():
    chosen = sample_queries(torch.tensor([12]), torch.tensor([4.5]), 7, torch.Generator().manual_seed(0))
    assert chosen.tolist() == [[5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(("length", "budget", "count"), [(23, 5.5, 7), (9, 1.0, 3), (10, 8.0, 5)])
def test_sampled_mean_is_unbiased_for_the_mean_over_eligible_positions(length, budget, count):
    values = torch.arange(length).double() ** 2
    eligible = values[torch.arange(length) >= budget]
    lengths, budgets = torch.full((20_000,), length), torch.full((20_000,), budget)
    chosen = sample_queries(lengths, budgets, count, torch.Generator().manual_seed(0))
    estimates = values[chosen].mean(1)
    error = (estimates.mean() - eligible.mean()).abs()
    assert error < 4 * estimates.std() / 20_000**0.5
    assert error < 0.01 * eligible.mean()


def test_sampled_mean_is_unbiased_over_generators():
    values = torch.arange(23).double()
    eligible = values[6:].mean()
    means = torch.stack(
        [
            values[sample_queries(torch.tensor([23]), torch.tensor([5.5]), 4, torch.Generator().manual_seed(s))].mean()
            for s in range(1500)
        ]
    )
    assert (means.mean() - eligible).abs() < 4 * means.std() / 1500**0.5


def test_every_eligible_position_is_drawn_equally_often():
    lengths, budgets = torch.full((20_000,), 13), torch.full((20_000,), 3.0)
    chosen = sample_queries(lengths, budgets, 4, torch.Generator().manual_seed(2))
    shares = torch.bincount(chosen.flatten(), minlength=13) / chosen.numel()
    assert shares[:3].sum() == 0
    torch.testing.assert_close(shares[3:], torch.full((10,), 0.1), rtol=0, atol=0.005)


def test_strata_vary_less_than_independent_draws():
    values = torch.arange(40).double()
    lengths, budgets = torch.full((4000,), 40), torch.full((4000,), 8.0)
    chosen = sample_queries(lengths, budgets, 8, torch.Generator().manual_seed(0))
    assert values[chosen].mean(1).std() < 0.3 * values[8:].std() / 8**0.5


def test_a_sequence_within_its_budget_repeats_its_last_position():
    chosen = sample_queries(torch.tensor([6, 30]), torch.tensor([9.0, 9.0]), 5, torch.Generator().manual_seed(0))
    assert chosen[0].tolist() == [5] * 5
    assert (chosen[1] >= 9).all()
    assert (chosen[1] < 30).all()


def test_the_same_generator_state_draws_the_same_queries():
    first, second = (
        sample_queries(torch.tensor([50]), torch.tensor([3.0]), 6, torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("block", [1, 4, 64])
def test_blocks_give_the_naive_sizes_and_gradients(block, monkeypatch):
    monkeypatch.setattr(capacity, "BLOCK", block)
    queries, valid, found = upto(14)[:, ::2], torch.ones(2, 14, dtype=torch.bool), []
    valid[1, :3] = False
    for form in (naive_expected_size_at, expected_size):
        leaf = draw().requires_grad_()
        sizes = form(leaf, upto(14), queries, valid)
        found.append((sizes.detach(), *torch.autograd.grad(sizes.square().sum(), leaf)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_held_for_the_backward_is_linear_in_tokens():
    """At all positions: the naive form holds tokens x tokens."""
    held = {}
    for tokens in (256, 512):
        for form in (naive_expected_size_at, expected_size):
            sizes = []
            leaf = draw(1, 2, tokens).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
                form(leaf, upto(tokens, 1), upto(tokens, 1))
            held[form, tokens] = sum(sizes)
    assert held[naive_expected_size_at, 512] > 3.9 * held[naive_expected_size_at, 256]
    assert held[expected_size, 512] < held[naive_expected_size_at, 512] / 20


def test_every_query_is_each_position_once():
    lengths = torch.tensor([4, 2])
    assert every_query(lengths).tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]
    sizes = expected_size(draw(tokens=4), upto(4), every_query(lengths))
    exact = naive_expected_size(draw(tokens=4), torch.arange(4))
    torch.testing.assert_close(sizes[0], exact[0])
    torch.testing.assert_close(sizes[1], torch.cat([torch.zeros(3, 2), exact[1, :, :2]], -1))
