"""Reads prompts into evicting caches: weighs continuations, streams texts, writes answers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retention.attach.forward import end_tokens, next_logits, tail_logits
from retention.attach.hard import evicting
from retention.cache.evicting import EvictingCache
from retention.data.collate import left_pad
from retention.data.template import Template
from retention.harness.settings import Loaded
from retention.serving.decoding import Answer, Decoding, steps

CHUNK = 512
"""Tokens of a streamed text between evictions, where `cache.prefill_chunk` does not say."""
Weighed = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would write it."""


class Reader:
    """One model under one policy; caches live inside `open()`, outside of which the model is as it was."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.model, self.config = loaded, loaded.model, loaded.cache
        self.template = Template(loaded.processor)
        self.tokenizer, self.pad = self.template.tokenizer, self.template.pad or 0

    @property
    def chunked(self) -> bool:
        """Whether contexts are evicted while they are read, so that padding would move where."""
        return self.config.prefill_chunk is not None or self.config.chunk_by_image

    @property
    def decodes(self) -> bool:
        """Whether the budget holds while answers are written; else question and answer come on top of it."""
        return self.config.evict_every is not None or self.loaded.policy.steps

    @contextmanager
    def open(self) -> Iterator[EvictingCache]:
        """An empty cache, to be forked."""
        loaded = self.loaded
        with evicting(self.model, loaded.policy, self.config, gates=loaded.gates, tokenizer=self.tokenizer) as empty:
            yield empty

    def text(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Rows of token ids as inputs, left-padded."""
        ids = [list(row) for row in rows]
        return {"input_ids": left_pad(ids, self.pad), "attention_mask": left_pad([[1] * len(row) for row in ids], 0)}

    def prefilled(self, empty: EvictingCache, context: dict[str, Tensor] | None) -> EvictingCache:
        """A cache that holds what is left of the contexts; of none, for prompts that are all question."""
        cache = empty.fork()
        if context is not None:
            next_logits(self.model, cache, context)
        return cache

    @torch.no_grad()
    def weigh(
        self, cache: EvictingCache, questions: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Weighed]]:
        """Every row's continuations behind its question; the cache is read once, and forked for each further token."""
        with cache.hold():
            first = next_logits(self.model, cache, self.text(questions))
        found: list[list[Weighed]] = [[] for _ in questions]
        for number in range(max(map(len, choices))):
            rows = [row for row, own in enumerate(choices) if number < len(own)]
            tokens = [list(choices[row][number]) for row in rows]
            behind = self._behind(cache, rows, tokens)
            for place, (row, own) in enumerate(zip(rows, tokens, strict=True)):
                tail = behind[place, behind.shape[1] - (len(own) - 1) :]
                found[row].append(
                    weighed(torch.cat([first[row : row + 1], tail]) if len(own) > 1 else first[row : row + 1], own)
                )
        return found

    def _behind(
        self, cache: EvictingCache, rows: list[int], tokens: list[list[int]]
    ) -> Float[Tensor, "rows fed vocabulary"]:
        """Logits of all tokens but each row's last, in a fork with these rows."""
        fed = [row[:-1] for row in tokens]
        longest = max(map(len, fed))
        if not longest:
            return cache.tokens.valid.new_empty(len(rows), 0, 0, dtype=torch.float32)
        fork = cache.fork()
        if len(rows) < len(cache.tokens.valid):
            fork.batch_select_indices(torch.tensor(rows, device=cache.tokens.valid.device))
        with fork.hold():
            return tail_logits(self.model, fork, self.text(fed), longest)

    @torch.no_grad()
    def stream(
        self, empty: EvictingCache, rows: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> tuple[EvictingCache, list[float]]:
        """Log-likelihoods of the last `counts` tokens of rows of one length, each given what was kept as it was read.

        The budget holds after every chunk of `cache.prefill_chunk` tokens, or 512; inside a chunk tokens see each other.
        """
        chunk = None if self.config.chunk_by_image else self.config.prefill_chunk or CHUNK
        cache = empty.fork(config=replace(self.config, prefill_chunk=chunk))
        logits = tail_logits(self.model, cache, self.text([row[:-1] for row in rows]), max(counts))
        found = zip(logits, rows, counts, strict=True)
        return cache, [weighed(own[-count:], list(row[-count:]))[0] for own, row, count in found]

    def write(
        self,
        cache: EvictingCache,
        questions: dict[str, Tensor],
        decoding: Decoding,
        seeds: Sequence[int],
    ) -> list[list[int]]:
        """Tokens answered to the questions, drawn from each row's own seed; the cache has not seen the last of each."""
        answers = [Answer(self.tokenizer) for _ in seeds]
        on_top: AbstractContextManager[Any] = nullcontext() if self.decodes else cache.hold()
        with on_top:
            for _ in steps(self.model, cache, questions, answers, decoding, seeds):
                pass
        return [answer.tokens for answer in answers]

    @property
    def ends(self) -> set[int | None]:
        """Tokens that end an answer."""
        return {*end_tokens(self.model), self.tokenizer.eos_token_id}

    def decode(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """What tokens say before the first that ends a sequence and the first of these texts, special tokens left out."""
        ends = self.ends
        own = tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
        text: str = self.tokenizer.decode(list(own), skip_special_tokens=True)
        for end in stop:
            text = text.split(end)[0] if end else text
        return text


def weighed(logits: Float[Tensor, "tokens vocabulary"], tokens: list[int]) -> Weighed:
    """Log-likelihood of tokens under the logits that each is drawn from."""
    own = torch.tensor(tokens, device=logits.device)
    likely = torch.log_softmax(logits.float(), -1).gather(-1, own[:, None])
    return float(likely.sum()), bool((logits.argmax(-1) == own).all())
