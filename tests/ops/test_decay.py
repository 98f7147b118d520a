"""Age, half-life and the exponent of the newest token."""

import math

import pytest
import torch

from retention.ops.decay import age, half_life, log_alpha, log_beta_from_score, offset_for_half_life

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
