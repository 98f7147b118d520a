"""Age, log retention and half-life: the only place that defines `age`."""

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def age(
    query_positions: Int[Tensor, "*batch queries"], key_positions: Int[Tensor, "*batch keys"]
) -> Int[Tensor, "*batch queries keys"]:
    """Query position minus key position: 0 on the diagonal, negative for keys in the future."""
    return query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)


def log_alpha(
    log_beta: Float[Tensor, "batch kv_heads keys"],
    positions: Int[Tensor, "batch kv_heads keys"],
    seen: Int[Tensor, " batch"],
    *,
    lookahead: int = 1,
    age_offset: int = 0,
) -> Float[Tensor, "batch kv_heads keys"]:
    """Log retention of cached tokens at the next query, `(seen - position) * log_beta`, fp32.

    The newest token has exponent 1: the training age evaluated one query later (arXiv 2512.03324, eq. 5;
    the public code ranks with exponent `seen + 1 - position`, which is `age_offset` 1). With `lookahead` n it is the
    log of the sum over the next n queries, `log_alpha + log(1 - beta^n) - log(1 - beta)` (a reconstruction).
    """
    ages = seen[:, None, None] + age_offset - positions
    alpha = ages.float() * log_beta.float()
    return alpha if lookahead == 1 else alpha + log_geometric_sum(log_beta, lookahead)


def naive_log_alpha(
    log_beta: Float[Tensor, "batch kv_heads keys"],
    positions: Int[Tensor, "batch kv_heads keys"],
    seen: Int[Tensor, " batch"],
    *,
    lookahead: int = 1,
    age_offset: int = 0,
) -> Float[Tensor, "batch kv_heads keys"]:
    """The same query by query, float64."""
    ages = seen[:, None, None] + age_offset - positions
    return torch.stack([(ages + j) * log_beta.double() for j in range(lookahead)]).logsumexp(0)


def log_geometric_sum(log_beta: Float[Tensor, "*shape"], terms: int) -> Float[Tensor, "*shape"]:
    """`log(1 + beta + ... + beta^(terms - 1))`, fp32, as the log of a quotient of `expm1`: right at both ends.

    It is 0 where beta is 0 and the log of `terms` where beta is 1, up to where fp32 tells them apart.
    """
    rate = log_beta.float().clamp(max=-1e-30)
    return torch.log(torch.expm1(terms * rate) / torch.expm1(rate))


def half_life(log_beta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Tokens after which retention has halved, `ln 2 / -log_beta`; inf where the gate never forgets."""
    return math.log(2) / log_beta.float().abs()


def offset_for_half_life(tokens: float) -> float:
    """Gate offset whose sigmoid retains one half after `tokens` tokens: `-log(expm1(ln 2 / tokens))`, written so that neither end overflows.

    Raises:
        ValueError: for a half-life that is not positive and finite.
    """
    if not 0 < tokens < math.inf:
        raise ValueError(f"expected a finite half-life above 0 tokens, got {tokens}; set init_half_life to e.g. 10000")
    rate = math.log(2) / tokens
    return -rate - math.log(-math.expm1(-rate))


def log_beta_from_score(score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Log of the per-step retention of a gate's pre-activation, fp32: `logsigmoid(score)`."""
    return torch.nn.functional.logsigmoid(score.float())


def log_beta_at(
    stored: Float[Tensor, "batch kv_heads keys 2"], coordinate: Float[Tensor, " batch"] | None
) -> Float[Tensor, "batch kv_heads keys"]:
    """`log_beta` of a score and its slope at a budget's coordinate, `logsigmoid(score + slope * u)`; None is u = 0."""
    score, slope = stored.unbind(-1)
    return log_beta_from_score(score if coordinate is None else score + slope * coordinate[:, None, None])


def budget_coordinate(
    budget: Shaped[Tensor, " batch"], low: float, high: float, reference: float
) -> Float[Tensor, " batch"]:
    """`u = log2(M / reference) / log2(high / low)`: 0 at the reference, 1 more from the lowest budget to the highest.

    A reconstruction: the published gates know no budget.
    """
    return torch.log2(budget.float() / reference) / math.log2(high / low)


def score_from_log_beta(log_beta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The pre-activation that `log_beta_from_score` was given, fp32: what gates that do not decay rank by.

    Relative error of fp32 on both sides of 0; scores above 85 come back as 85, where fp32 ends.
    """
    logged = log_beta.float().clamp(max=-1e-37)
    return logged - torch.log(-torch.expm1(logged))
