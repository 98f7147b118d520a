"""Prefill a context into a cache and answer its turns, greedily, the model's own answers staying in the context."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from retention.cache.evicting import EvictingCache
from retention.data.render import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _left_pad(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def _forward(model: "PreTrainedModel", cache: EvictingCache, ids: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    """Logits of the last token of each row; positions count tokens seen, padding excluded."""
    ids, mask = ids.to(model.device), mask.to(model.device)
    before = cache.seen() if cache.columns else mask.new_zeros(mask.shape[0])
    past = cache.tokens.valid.to(mask.dtype) if cache.columns else mask[:, :0]
    positions = (before[:, None] + mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids,
        attention_mask=torch.cat([past, mask], 1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **inputs,
    )
    return out.logits[:, -1]


@torch.no_grad()
def prefill(
    model: "PreTrainedModel", cache: EvictingCache, rendered: Rendered, *, pad: int = 0, first_question: bool = False
) -> Tensor:
    """Run the contexts into the cache, with the first question behind them if asked; returns the last logits."""
    ids, mask = rendered.inputs["input_ids"], rendered.inputs["attention_mask"]
    if first_question:
        rows = [ids[i][mask[i].bool()].tolist() + turns.questions[0] for i, turns in enumerate(rendered.turns)]
        ids, mask = _left_pad(rows, pad)
    return _forward(model, cache, ids, mask, **_beside_text(model, rendered.inputs))


@torch.no_grad()
def read_on(model: "PreTrainedModel", cache: EvictingCache, rendered: Rendered) -> None:
    """Feed the second prompts, where there are any; the cache evicts after them as after every prompt."""
    if rendered.later is not None:
        ids, mask = rendered.later["input_ids"], rendered.later["attention_mask"]
        _forward(model, cache, ids, mask, **_beside_text(model, rendered.later))


def _beside_text(model: "PreTrainedModel", inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.to(model.device) for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}


@torch.no_grad()
def answer_turns(
    model: "PreTrainedModel", cache: EvictingCache, rendered: Rendered, *, pad: int = 0
) -> list[list[list[int]]]:
    """Token ids answered to every turn of every row.

    Nothing is evicted meanwhile: questions and answers are held on top of the context's budget, for every
    policy alike.
    """
    n_turns = len(rendered.turns[0].questions)
    answers: list[list[list[int]]] = [[] for _ in rendered.turns]
    carried: list[list[int]] = [[] for _ in rendered.turns]
    with cache.hold():
        for turn in range(n_turns):
            rows = [carried[i] + t.questions[turn] for i, t in enumerate(rendered.turns)]
            logits = _forward(model, cache, *_left_pad(rows, pad))
            limit = max(e.turns[turn].max_new_tokens for e in rendered.examples)
            produced = _greedy(model, cache, logits, limit, pad)
            for i, row in enumerate(produced.tolist()):
                answers[i].append(row)
                carried[i] = row[-1:] if row[-1] != pad else []
    return answers


def _greedy(
    model: "PreTrainedModel", cache: EvictingCache, logits: Tensor, limit: int, pad: int
) -> Int[Tensor, "batch new"]:
    """Up to `limit` greedy tokens, padding after a row's end of sequence; the last one is not yet in the cache."""
    ends = model.generation_config.eos_token_id
    stop = torch.tensor([] if ends is None else ends, dtype=torch.long, device=logits.device).flatten()
    produced = [logits.argmax(-1)]
    alive = ~torch.isin(produced[-1], stop)
    while len(produced) < limit and alive.any():
        token = _forward(model, cache, produced[-1][:, None], alive.long()[:, None]).argmax(-1)
        produced.append(torch.where(alive, token, pad))
        alive = alive & ~torch.isin(token, stop)
    return torch.stack(produced, 1)
