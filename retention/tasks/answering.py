"""Prefill a context into a cache and answer its turns, the model's own answers staying in the context."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from retention.attach.forward import end_tokens, next_logits
from retention.cache.evicting import EvictingCache
from retention.data.collate import appended, left_pad
from retention.data.render import Rendered
from retention.tasks.sampling import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _text(rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Rows of token ids as inputs, left-padded."""
    return {"input_ids": left_pad(rows, pad), "attention_mask": left_pad([[1] * len(row) for row in rows], 0)}


@torch.no_grad()
def prefill(
    model: "PreTrainedModel", cache: EvictingCache, rendered: Rendered, *, pad: int = 0, first_question: bool = False
) -> Tensor:
    """Run the contexts into the cache, with the first question behind them if asked; returns the last logits."""
    inputs = rendered.inputs
    if first_question:
        inputs = appended(inputs, [turns.questions[0] for turns in rendered.turns], pad)
    return next_logits(model, cache, inputs)


@torch.no_grad()
def read_on(model: "PreTrainedModel", cache: EvictingCache, rendered: Rendered) -> None:
    """Feed the second prompts, where there are any; the cache evicts after them as after every prompt."""
    if rendered.later is not None:
        next_logits(model, cache, rendered.later)


@torch.no_grad()
def feed(model: "PreTrainedModel", cache: EvictingCache, rows: list[list[int]], *, pad: int = 0) -> None:
    """Run rows of token ids into the cache, left-padded, on top of its budget."""
    with cache.hold():
        next_logits(model, cache, _text(rows, pad))


@torch.no_grad()
def answer_turns(
    model: "PreTrainedModel", cache: EvictingCache, rendered: Rendered, *, pad: int = 0
) -> list[list[list[int]]]:
    """Token ids answered to every turn of every row.

    Nothing is evicted meanwhile: questions and answers are held on top of the context's budget, for every
    policy alike; unless the examples are about the budget while answering. Turns that are independent are each
    asked of the cache as it is.
    """
    examples = rendered.examples
    n_turns, rule = len(rendered.turns[0].questions), examples[0]
    answers: list[list[list[int]]] = [[] for _ in examples]
    carried: list[list[int]] = [[] for _ in examples]
    sampler = Sampler(examples)
    for turn in range(n_turns):
        asked = cache.fork() if rule.independent else cache
        rows = [carried[i] + t.questions[turn] for i, t in enumerate(rendered.turns)]
        with nullcontext() if rule.evicts_answers else asked.hold():
            logits = next_logits(model, asked, _text(rows, pad))
            limit = max(e.turns[turn].max_new_tokens for e in examples)
            produced = _written(model, asked, logits, limit, pad, sampler)
        for i, row in enumerate(produced.tolist()):
            answers[i].append(row)
            carried[i] = row[-1:] if row[-1] != pad and not rule.independent else []
    return answers


def _written(
    model: "PreTrainedModel", cache: EvictingCache, logits: Tensor, limit: int, pad: int, sampler: Sampler
) -> Int[Tensor, "batch new"]:
    """Up to `limit` tokens, padding after a row's end of sequence; the last one is not yet in the cache."""
    stop = torch.tensor(end_tokens(model), dtype=torch.long, device=logits.device)
    produced = [sampler(logits)]
    alive = ~torch.isin(produced[-1], stop)
    while len(produced) < limit and alive.any():
        newest = {"input_ids": produced[-1][:, None], "attention_mask": alive.long()[:, None]}
        token = sampler(next_logits(model, cache, newest))
        produced.append(torch.where(alive, token, pad))
        alive = alive & ~torch.isin(token, stop)
    return torch.stack(produced, 1)
