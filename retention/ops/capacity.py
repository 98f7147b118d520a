"""Expected cache size of soft gates, exact and at sampled queries: what the budget is held against."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retention.ops.decay import age

BLOCK = 64
"""Queries that are held against all tokens at a time."""


def naive_expected_size(
    log_beta: Float[Tensor, "*heads tokens"],
    positions: Int[Tensor, " tokens"],
) -> Float[Tensor, "*heads tokens"]:
    """`S[t] = sum over i <= t of exp((t - i) log_beta_i)` at every query of one document (arXiv 2512.03324, eq. 7).

    1 <= S[t] <= t + 1; exact, with a tokens x tokens intermediate.
    """
    ages = age(positions, positions)
    weights = torch.exp(ages.clamp(min=0) * log_beta.float().unsqueeze(-2))
    return (weights * (ages >= 0)).sum(-1)


def naive_expected_size_at(
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    positions: Int[Tensor, "batch tokens"],
    queries: Int[Tensor, "batch queries"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch kv_heads queries"]:
    """The same sum at chosen query positions, padding not counted; a tokens x queries intermediate."""
    ages = age(queries, positions)
    alive = ages >= 0 if valid is None else (ages >= 0) & valid[:, None]
    weights = torch.exp(ages.clamp(min=0)[:, None] * log_beta.float()[:, :, None])
    return (weights * alive[:, None]).sum(-1)


def expected_size(
    log_beta: Float[Tensor, "batch kv_heads tokens"],
    positions: Int[Tensor, "batch tokens"],
    queries: Int[Tensor, "batch queries"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch kv_heads queries"]:
    """The same in blocks of queries, computed again in the backward: memory linear in tokens, for any queries.

    At all positions it is exact; at sampled ones the work is linear too.
    """

    def block(part: Tensor) -> Tensor:
        return naive_expected_size_at(log_beta, positions, part, valid)

    return torch.cat([checkpoint(block, part, use_reentrant=False) for part in queries.split(BLOCK, 1)], -1)


def sample_queries(
    lengths: Int[Tensor, " batch"],
    budget: Float[Tensor, " batch"],
    count: int,
    generator: torch.Generator,
) -> Int[Tensor, "batch queries"]:
    """One query position from each of `count` equal strata of the eligible positions `[budget, length)`.

    Averages over these positions are unbiased for the average over all eligible ones (strata of equal
    width, positions uniform inside). Sequences not longer than their budget have no eligible position;
    their entries repeat the last one and must be weighted 0.
    """
    start = budget.ceil().clamp(max=lengths - 1)
    width = (lengths - start).float() / count
    jitter = torch.rand(len(lengths), count, generator=generator).to(width.device)
    steps = torch.arange(count, device=width.device)
    chosen = start[:, None] + (steps + jitter) * width[:, None]
    return chosen.floor().long().clamp(max=(lengths - 1)[:, None])


def every_query(lengths: Int[Tensor, " batch"]) -> Int[Tensor, "batch queries"]:
    """All query positions `[0, length)` of each sequence, in front of shorter ones -1, which no budget is below."""
    last = int(lengths.max())
    return (torch.arange(last, device=lengths.device) - (last - lengths)[:, None]).clamp(min=-1)
