"""Age, log retention and half-life: the only place that defines `age`."""

import math

import torch
from jaxtyping import Float, Int
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
) -> Float[Tensor, "batch kv_heads keys"]:
    """Log retention of cached tokens at the next query, `(seen - position) * log_beta`, fp32.

    The newest token has exponent 1: the training age evaluated one query later (arXiv 2512.03324, eq. 5;
    the public code ranks with exponent `seen + 1 - position`).
    """
    return (seen[:, None, None] - positions).float() * log_beta.float()


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


def score_from_log_beta(log_beta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The pre-activation that `log_beta_from_score` was given, fp32: what gates that do not decay rank by.

    Relative error of fp32 on both sides of 0; scores above 85 come back as 85, where fp32 ends.
    """
    logged = log_beta.float().clamp(max=-1e-37)
    return logged - torch.log(-torch.expm1(logged))
