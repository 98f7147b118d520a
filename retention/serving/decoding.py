"""How answers are written, token by token, and read while they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TextIteratorStreamer

from retention.attach.forward import end_tokens, next_logits
from retention.cache.evicting import EvictingCache
from retention.data.example import Sampling
from retention.tasks.sampling import nucleus
from retention.types import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Decoding:
    """How long an answer may be and how its tokens are chosen."""

    max_new_tokens: int = 256
    """Most tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability, that one is drawn from."""
    seed: int = 0
    """Of what is drawn."""
    stop: Sequence[str] = field(default=())
    """Texts that end an answer; they are part of it."""

    def __post_init__(self) -> None:
        require(
            [
                (self.max_new_tokens >= 1, "max_new_tokens of at least 1", self.max_new_tokens),
                (self.temperature >= 0, "a temperature of 0 or more", self.temperature),
                (0 < self.top_p <= 1, "top_p above 0, at most 1", self.top_p),
                (not isinstance(self.stop, str) and all(self.stop), "stop as a list of texts", self.stop),
            ]
        )


class Answer(TextIteratorStreamer):
    """One answer under way: iterating gives its text as it comes, from any thread; whoever reads may be slow."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.reason: str | None = None
        """Why it ended: stop (the model or a stop text), length, cancelled; None while it is under way."""
        self.cancelled = False

    def add(self, token: int) -> None:
        """The next token."""
        self.tokens.append(token)
        self.put(torch.tensor([token]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that will not change any more."""
        if text or stream_end:
            self.pieces.append(text)
            super().on_finalized_text(text, stream_end)

    def close(self, error: BaseException | None = None) -> None:
        """Nothing more will come; whoever reads gets the error, if there is one."""
        if error is not None:
            self.reason = "error"
            self.text_queue.put(error)
        else:
            self.end()

    def cancel(self) -> None:
        """Ask for no more; the answer ends behind the step under way."""
        self.cancelled = True

    def __next__(self) -> str:
        """The next piece of text."""
        value = self.text_queue.get()
        if isinstance(value, BaseException):
            raise value
        if value == self.stop_signal:
            raise StopIteration
        return value

    @property
    def text(self) -> str:
        """What is written so far."""
        return "".join(self.pieces)

    def whole(self) -> str:
        """All of it, when it has ended."""
        for _ in self:
            pass
        return self.text


@torch.no_grad()
def steps(
    model: "PreTrainedModel",
    cache: EvictingCache,
    inputs: dict[str, Tensor],
    answers: Sequence[Answer],
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
) -> Iterator[None]:
    """Write one answer per row into the cache, one forward at a time: every step of this iterator is one.

    The last token of an answer is not fed any more. A row that has ended waits for the others. `seeds` are the rows'
    own, in place of `decoding.seed` for all.
    """
    ends = end_tokens(model)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [decoding.seed] * len(answers)]
    while True:
        logits = next_logits(model, cache, inputs)
        for row, answer in enumerate(answers):
            if answer.reason is None:
                _write(answer, _chosen(logits[row], decoding, generators[row]), ends, decoding)
        alive = [answer.reason is None for answer in answers]
        if not any(alive):
            return
        yield
        newest = torch.tensor([[answer.tokens[-1]] for answer in answers])
        inputs = {"input_ids": newest, "attention_mask": torch.tensor(alive).long()[:, None]}


def _write(answer: Answer, token: int, ends: list[int], decoding: Decoding) -> None:
    """Add a token, and end the answer where it is over."""
    answer.add(token)
    if token in ends or any(text in "".join(answer.pieces) + _tail(answer) for text in decoding.stop):
        answer.reason = "stop"
    elif len(answer.tokens) >= decoding.max_new_tokens:
        answer.reason = "length"
    elif answer.cancelled:
        answer.reason = "cancelled"


def _tail(answer: Answer) -> str:
    """Text that is held back until it is sure."""
    held = answer.tokenizer.decode(answer.token_cache, skip_special_tokens=True)
    return str(held)[answer.print_len :]


def _chosen(logits: Float[Tensor, " vocabulary"], decoding: Decoding, generator: torch.Generator) -> int:
    if decoding.temperature == 0:
        return int(logits.argmax())
    shares = nucleus(logits.float().cpu(), Sampling(decoding.temperature, decoding.top_p))
    return int(torch.multinomial(shares, 1, generator=generator))
