"""How close an arm stays to the full cache where the budget holds while answers are written: on what the full cache writes.

The full cache writes its greedy answers; both then read them token by token, the arm evicting as it would while writing.
A batch costs two more answers of the full cache, every arm one; the full cache's logits are held until the batch is done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from retention.attach.forward import end_tokens, next_logits
from retention.cache.evicting import EvictingCache
from retention.data.collate import left_pad
from retention.data.render import Rendered
from retention.evaluation.fidelity import UNKNOWN, agreement, divergence
from retention.tasks.answering import answer_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]


@dataclass
class Written:
    """The full cache's side of one batch; `judge` holds an arm's cache against it."""

    model: "PreTrainedModel"
    batch: Rendered
    """With the answers that the full cache wrote."""
    pad: int
    logits: list[Float[Tensor, "batch tokens vocabulary"]]
    """Of every turn, before each of its tokens."""

    @classmethod
    def of(cls, model: "PreTrainedModel", full: EvictingCache, batch: Rendered, pad: int) -> "Written":
        """Let a full cache that has read the contexts answer their turns, inside the block it comes from."""
        greedy = replace(batch, examples=[replace(example, sampling=None) for example in batch.examples])
        texts, ends = answer_turns(model, full.fork(), greedy, pad=pad), end_tokens(model)
        turns = [
            replace(turns, answers=[until(text, ends) for text in own])
            for turns, own in zip(batch.turns, texts, strict=True)
        ]
        told = replace(batch, turns=turns)
        return cls(model, told, pad, list(_followed(model, full, told, pad)))

    def judge(self, cache: EvictingCache) -> tuple[list[list[Row]], None]:
        """Per context and turn what rows say of fidelity; what it misses changes with every eviction and is not told.

        `cache` holds what an arm kept of the contexts; it stays as it is.
        """
        found: list[list[Row]] = [[] for _ in self.batch.examples]
        for turn, policy in enumerate(_followed(self.model, cache, self.batch, self.pad)):
            for i, own in enumerate(self.batch.turns):
                count = len(own.answers[turn])
                pair = self.logits[turn][i, :count], policy[i, :count]
                told = {"kl_teacher": round(divergence(*pair), 9), "top1_agree": agreement(*pair)}
                found[i].append(UNKNOWN | told if self.batch.examples[i].turns[turn].scored else dict(UNKNOWN))
        return found, None


def until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first that ends a sequence, with it."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens)) + 1]


def _followed(
    model: "PreTrainedModel", cache: EvictingCache, batch: Rendered, pad: int
) -> Iterator[Float[Tensor, "batch tokens vocabulary"]]:
    """Logits before each token of the batch's answers, turn by turn, read one at a time; the cache evicts as it is set."""
    alone = batch.examples[0].independent
    cache, carried = cache.fork(), list[list[int]]([[]] * len(batch.examples))
    for turn in range(len(batch.turns[0].questions)):
        asked = cache.fork() if alone else cache
        answers = [turns.answers[turn] for turns in batch.turns]
        ids = [before + turns.questions[turn] for before, turns in zip(carried, batch.turns, strict=True)]
        inputs = {"input_ids": left_pad(ids, pad), "attention_mask": left_pad([[1] * len(row) for row in ids], 0)}
        logits = [next_logits(model, asked, inputs)]
        for step in range(max(map(len, answers)) - 1):
            alive = [step + 1 < len(answer) for answer in answers]
            newest = [[answer[step]] if more else [pad] for answer, more in zip(answers, alive, strict=True)]
            mask = torch.tensor(alive).long()[:, None]
            logits.append(next_logits(model, asked, {"input_ids": torch.tensor(newest), "attention_mask": mask}))
        yield torch.stack(logits, 1)
        carried = [[] if alone else answer[-1:] for answer in answers]
