"""Oracles, which are told the questions: by the evidence, or by the attention of the answers; no methods, references."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retention.policies.base import Policy
from retention.policies.collect import FORESEEN, Foresight
from retention.types import KVState

MODES, REDUCTIONS, QUERIES = ("evidence", "attention"), ("max", "mean"), ("answers", "all")


@dataclass
class Oracle(Policy):
    """What perfect knowledge of the questions keeps; both modes keep the most recent tokens where nothing was told.

    `evidence`: `score = position`, with the tokens that `EvictingCache.mark_evidence` named in a higher tier. No upper
    bound: layers and heads may need different tokens, and a model may have moved what it read to tokens behind the
    evidence. `attention`: `s_j = max over answer-query rows and the query group of A`, the full softmax of a
    teacher-forced pass over the questions with their answers (`cache.tokens.inputs.answers`; evaluations tell both)
    behind the full cache, right before the decision; nothing of it stays. Per head, or one pool with
    `cache.allocator=global`. Entries that stay keep their score at later evictions.
    """

    needs_evidence = True

    mode: str = "evidence"
    """evidence or attention."""
    reduction: str = "max"
    """max or mean over queries and the query group, for mode=attention."""
    queries: str = "answers"
    """answers (rows that a token of an answer is read off) or all (those of the questions too), for mode=attention."""

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("reduction", REDUCTIONS), ("queries", QUERIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected oracle.{name} {' or '.join(known)}, got {getattr(self, name)!r}")

    @property
    def collectors(self) -> tuple[str, ...]:
        """Attention of the answers, where it ranks by that."""
        return (FORESEEN,) if self.mode == "attention" else (self.collector,)

    def second_pass(self) -> Foresight | None:
        """The questions and answers to come."""
        attends = self.mode == "attention"
        return Foresight(self.queries == "all", self.reduction == "mean") if attends else None

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """What the answers heed; otherwise newer is better."""
        found = kv.statistics.get(FORESEEN) if self.mode == "attention" else None
        return kv.positions.float() if found is None else found

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"] | None:
        """Evidence before everything else."""
        if self.mode == "attention":
            return None
        return torch.zeros_like(kv.positions) if kv.evidence is None else kv.evidence.long()


@dataclass
class AttentionOracle(Oracle):
    """The same by attention."""

    mode: str = "attention"
