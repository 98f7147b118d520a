"""TGV-KV: text decides which layers hold how much, and which visual tokens stay (arXiv 2606.03075)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retention.ops.scores import mean_over_heads
from retention.policies.base import Policy, StepRule
from retention.types import KVState

MODES = ("generalised", "as_published")
DECODES = ("grow", "published")


@dataclass
class TGVKV(Policy):
    """Text queries T behind vision V rank a layer's entries, one ranking for all its heads (means over heads).

    - `tvb`: `budget_l ~ sum_{i in T, j in V} A_l[i, j]`.
    - `twr`: `score(j in V) = sum_{i in T, i > j} u_i A[i, j]`, `u_i` the mean attention that text row i receives from
      the text rows that see it; without, all rows weigh the same.
    - `tpr`: text before vision, by `score(j in T) = sum_{r in T, r >= j} A[r, j]`; where text alone exceeds a layer's
      budget, no vision stays in it. Without, one ranking, in which vision is rescaled to the attention it receives.

    The first 4 tokens and the last one come before everything else.

    Differs from the equations: vision scores are divided by the number of text rows behind the token, so that images
    may lie anywhere; the 32 newest queries stand in where no text follows the last image. Rows add up over chunks and
    turns, with u from the rows of the same forward; what left takes its share of `tvb` with it.

    `as_published` follows the public implementation: text is ranked by the attention of all queries, vision scores are
    not divided, and what a layer cannot hold is lost. Differs from it: several images and padded batches are allowed,
    and text between images counts.

    Decoded tokens stay (`decode=grow`) or, with `cache.evict_every`, are ranked like the prompt. `decode=published` is
    the rule of the public implementation: a layer's budget grows as `seen * budget_l / N` from what the prompt left of
    its N tokens, and at every step at most one entry leaves, the least in the newest query's attention (mean over
    heads), but none of the first 4 and none of the prompts' text behind the last image. Decoded tokens may leave.
    """

    collector = "text_rows"
    allocator = "weighted"

    mode: str = "generalised"
    """generalised or as_published."""
    tvb: bool = True
    """Text-to-vision budgets of the layers; false is equal ones."""
    twr: bool = True
    """Text-weighted relevance of vision; false weighs all text rows alike."""
    tpr: bool = True
    """Text before vision; false ranks both together."""
    redistribute: bool = True
    """What a layer cannot hold goes to the others; false loses it, as `as_published` does."""
    decode: str = "grow"
    """grow (decoded tokens stay) or published (budgets grow, at most one entry leaves at each step)."""
    sinks: int = 4
    """First tokens that come before everything else."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"expected tgvkv.mode {' or '.join(MODES)}, got {self.mode!r}")
        if self.decode not in DECODES:
            raise ValueError(f"expected tgvkv.decode {' or '.join(DECODES)}, got {self.decode!r}")
        if self.sinks < 0:
            raise ValueError(f"expected tgvkv.sinks of 0 or more, got {self.sinks}")

    @property
    def collectors(self) -> tuple[str, ...]:
        """With the public implementation, column sums over all queries as well; with its decoding, the newest row."""
        ranks = ("column_sums",) if self.mode == "as_published" else ()
        return (self.collector, *ranks, *(("window_rows",) if self.steps else ()))

    @property
    def observed_rows(self) -> int:
        """The newest query, where decoding reads it."""
        return 1 if self.steps else 0

    @property
    def step_rule(self) -> StepRule | None:
        """As published."""
        return self.step_score if self.decode == "published" else None

    def step_score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Attention of the newest query, mean over heads; infinite for the first tokens and the text behind images."""
        assert kv.suffix is not None
        rows = self.observed(kv, "window_rows")[:, :, -1]
        heeded = mean_over_heads(rows, kv.positions, kv.valid)
        return heeded.masked_fill((kv.positions < self.sinks) | kv.suffix, torch.inf)

    @property
    def least(self) -> int:
        """The first tokens and the last."""
        return self.sinks + 1

    @property
    def redistributes(self) -> bool:
        """Not in the public implementation."""
        return self.redistribute and self.mode != "as_published"

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """Text by what it receives, vision by what heeded text gives it, fp32."""
        known, published = kv.statistics, self.mode == "as_published"
        text = known["column_sums" if published else "text_sums"]
        vision = known["text_relevance" if self.twr else "text_sums"]
        vision = vision if published else vision / known["text_counts"].clamp(min=1)
        text, vision = (mean_over_heads(x, kv.positions, kv.valid) for x in (text, vision))
        if not self.tpr:
            there = kv.visual & kv.valid
            mass, sum_ = (torch.where(there, x, 0.0).sum((1, 2), keepdim=True) for x in (known["text_sums"], vision))
            vision = vision * mass / sum_.clamp(min=1e-20)
        return torch.where(kv.visual, vision, text)

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """First and last tokens, then text, then vision."""
        own = (kv.positions < self.sinks) | (kv.positions == kv.seen[:, None, None] - 1)
        return 2 * own.long() + (~kv.visual & ~own & self.tpr).long()

    def layer_weight(self, kv: KVState) -> Float[Tensor, " batch"]:
        """Attention from text rows to vision, mean over heads."""
        mass = torch.where(kv.visual & kv.valid, kv.statistics["text_sums"], 0.0).sum(2).mean(1)
        return mass if self.tvb else torch.ones_like(mass)
