"""Age, half-life and the exponent of the newest token."""

import math

import pytest
import torch

from retention.ops.decay import (
    age,
    budget_coordinate,
    half_life,
    log_alpha,
    log_beta_at,
    log_beta_from_score,
    log_geometric_sum,
    naive_log_alpha,
    offset_for_half_life,
)

TABLE = [
    (0, 1.0),
    (2, 5.46),
    (4, 38.2),
    (6, 280.0),
    (8, 2067.0),
    (10, 15268.0),
    (14, 8.3e5),
    (18, 4.55e7),
]


@pytest.mark.parametrize(("offset", "tokens"), TABLE)
def test_half_life_of_an_offset(offset, tokens):
    found = half_life(log_beta_from_score(torch.tensor([float(offset)])))
    assert float(found) == pytest.approx(tokens, rel=5e-3)


@pytest.mark.parametrize("tokens", [1.0, 5.46, 100.0, 10_000.0, 4.5e7])
def test_offset_for_half_life_inverts_half_life(tokens):
    offset = torch.tensor([offset_for_half_life(tokens)])
    assert float(half_life(log_beta_from_score(offset))) == pytest.approx(tokens, rel=1e-5)


@pytest.mark.parametrize("tokens", [0.5, 1.0, 10_000.0])
def test_retention_halves_after_the_half_life(tokens):
    log_beta = float(log_beta_from_score(torch.tensor(offset_for_half_life(tokens))))
    assert math.exp(tokens * log_beta) == pytest.approx(0.5, rel=1e-5)


def test_a_gate_that_never_forgets_has_infinite_half_life():
    assert half_life(torch.zeros(1)).isposinf().all()


def test_log_beta_is_never_positive_and_always_finite_in_fp32():
    scores = torch.tensor([-1e4, -20.0, 0.0, 20.0, 1e4], dtype=torch.bfloat16)
    log_beta = log_beta_from_score(scores)
    assert log_beta.dtype == torch.float32
    assert (log_beta <= 0).all()
    assert torch.isfinite(log_beta).all()


def test_the_newest_token_has_exponent_one():
    log_beta = -torch.rand(1, 2, 5, generator=torch.Generator().manual_seed(0))
    found = log_alpha(log_beta, torch.arange(5).expand(1, 2, 5), torch.tensor([5]))
    assert torch.equal(found[..., -1], log_beta[..., -1])
    torch.testing.assert_close(found, log_beta * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))


def test_each_sequence_counts_its_own_tokens_seen():
    log_beta = torch.full((2, 1, 3), -0.5)
    found = log_alpha(log_beta, torch.arange(3).expand(2, 1, 3), torch.tensor([3, 10]))
    assert found[:, 0, 0].tolist() == [-1.5, -5.0]


def test_age_is_zero_on_the_diagonal_and_negative_for_the_future():
    ages = age(torch.tensor([[3, 4, 9]]), torch.tensor([[3, 4, 9]]))
    assert ages.tolist() == [[[0, -1, -6], [1, 0, -5], [6, 5, 0]]]


@pytest.mark.parametrize("tokens", [0.0, -3.0, float("nan"), float("inf")])
def test_a_half_life_without_meaning_is_refused_with_a_sentence(tokens):
    with pytest.raises(ValueError, match=r"expected .*half-life.*got .*init_half_life"):
        offset_for_half_life(tokens)


@pytest.mark.parametrize("tokens", [1e-4, 1e300])
def test_extreme_half_lives_have_a_finite_offset(tokens):
    assert math.isfinite(offset_for_half_life(tokens))


def test_a_saturated_gate_reads_as_never_forgetting():
    assert half_life(log_beta_from_score(torch.tensor([200.0]))).isposinf().all()


@pytest.mark.parametrize("lookahead", [1, 2, 7, 64])
@pytest.mark.parametrize("age_offset", [0, 1])
def test_retention_over_several_queries_equals_the_naive_twin(lookahead, age_offset):
    """From gates that forget at once to gates that never do."""
    log_beta = -torch.logspace(-12, 2, 30).expand(2, 2, 30).clone()
    log_beta[1, 1, :2] = 0.0
    positions, seen = torch.arange(30).expand(2, 2, 30), torch.tensor([30, 41])
    how = {"lookahead": lookahead, "age_offset": age_offset}
    found, expected = log_alpha(log_beta, positions, seen, **how), naive_log_alpha(log_beta, positions, seen, **how)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_one_query_ahead_is_the_plain_score_to_the_bit():
    log_beta = -torch.rand(1, 2, 5, generator=torch.Generator().manual_seed(0))
    where = torch.arange(5).expand(1, 2, 5), torch.tensor([9])
    assert torch.equal(log_alpha(log_beta, *where, lookahead=1, age_offset=0), log_alpha(log_beta, *where))
    assert torch.equal(log_alpha(log_beta, *where, age_offset=1), log_alpha(log_beta, where[0], where[1] + 1))


def test_what_never_forgets_counts_every_query_and_what_forgets_at_once_counts_one():
    ends = log_geometric_sum(torch.tensor([0.0, -1e-38, -1e-20, -1e4]), 5)
    torch.testing.assert_close(ends, torch.tensor([5.0, 5.0, 5.0, 1.0]).log())


def test_looking_ahead_prefers_what_lasts():
    """A fresh token that fades against an old one that stays: the next query alone prefers the former."""
    log_beta, positions = torch.tensor([[[-0.5, -0.06]]]), torch.tensor([[[9, 0]]])
    near, far = (log_alpha(log_beta, positions, torch.tensor([10]), lookahead=n)[0, 0] for n in (1, 8))
    assert near[0] > near[1]
    assert far[0] < far[1]


def test_a_score_and_its_slope_give_log_beta_at_any_budget():
    stored = torch.tensor([[[[2.0, 0.5], [-1.0, 3.0]]]])
    u = budget_coordinate(torch.tensor([32]), 4.0, 64.0, 16.0)
    assert u.tolist() == [0.25]
    torch.testing.assert_close(log_beta_at(stored, u), log_beta_from_score(torch.tensor([[[2.125, -0.25]]])))
    assert torch.equal(log_beta_at(stored, None), log_beta_from_score(stored[..., 0]))


@pytest.mark.parametrize("name", ["trim_kv", "db_trim_kv"])
def test_the_policies_look_ahead_and_offset_ages_as_told(name):
    from retention import POLICIES
    from retention.types import KVState

    log_beta, positions = (
        -torch.rand(1, 2, 5, generator=torch.Generator().manual_seed(0)),
        torch.arange(5).expand(1, 2, 5),
    )
    nothing = torch.zeros(1, 2, 5, dtype=torch.bool)
    kv = KVState(lambda: (log_beta, log_beta), positions, ~nothing, nothing, nothing, torch.tensor([9]), log_beta)
    for how in ({}, {"lookahead": 5}, {"age_offset": 1}, {"lookahead": 3, "age_offset": 1}):
        assert torch.equal(POLICIES[name](**how).score(kv), log_alpha(log_beta, positions, torch.tensor([9]), **how))
    for how in ({"lookahead": 0}, {"age_offset": -1}):
        with pytest.raises(ValueError, match="lookahead of at least 1 and age_offset of 0 or more"):
            POLICIES[name](**how)
