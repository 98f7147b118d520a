"""A conversation: its messages, its cache, and the token between them; saved, and gone on with later."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor

from retention.attach.forward import end_tokens
from retention.cache.evicting import EvictingCache
from retention.files import write_json
from retention.serving.decoding import Answer, Decoding, steps
from retention.serving.engine import Job
from retention.serving.prompt import Message

if TYPE_CHECKING:
    from retention.serving.pipeline import Pipeline

FILE = "conversation.json"


class Conversation:
    """Messages and answers over one evicting cache; one answer at a time."""

    def __init__(self, owner: "Pipeline", cache: EvictingCache, gates: str | None = None) -> None:
        """`gates` names the set that scores the cache's tokens."""
        self.owner, self.cache, self.gates = owner, cache, gates
        self.messages: list[Message] = []
        """What was said so far, images as places."""
        self.last: int | None = None
        """Last token of the last answer, which the cache has not seen."""
        self.broken = False
        self._free = threading.Lock()

    def say(self, messages: Any, **decoding: Any) -> str:
        """The answer to a text, or to further messages; `decoding` as in `Decoding`."""
        return self.stream(messages, **decoding).whole()

    def stream(self, messages: Any, **decoding: Any) -> Answer:
        """The same, to be read while it is written.

        Raises:
            ValueError: for messages that cannot be read, or while another answer is under way.
        """
        how = Decoding(**decoding)
        new, images = self.owner.prompts.read(messages)
        self._take()
        answer = Answer(self.owner.tokenizer)
        job = Job(lambda: self._steps(new, images, answer, how), [answer], lambda: self._ended(answer))
        try:
            self.owner.engine.submit(job)
        except RuntimeError:
            self._free.release()
            raise
        return answer

    @property
    def bytes(self) -> int:
        """What the cache holds now."""
        return self.cache.bytes().total

    def _take(self) -> None:
        if not self._free.acquire(blocking=False):
            raise ValueError("expected one answer of a conversation at a time, got another question; wait or fork it")
        if self.broken:
            self._free.release()
            raise ValueError("this conversation broke off with an error; begin another one")

    def _steps(self, new: list[Message], images: list[Any], answer: Answer, how: Decoding) -> Iterator[None]:
        """Runs in the engine's thread, tokenizers included, which are not made for several."""
        prompts = self.owner.prompts
        if self.messages:
            inputs = self._behind(prompts.following(self.messages, new, images))
        else:
            inputs = prompts.first([new], [images])
        self.broken = True  # until the prompt is in the cache
        self.messages = [*self.messages, *new]
        for _ in steps(self.owner.model, self.cache, inputs, [answer], how):
            self.broken = False
            yield
        self.broken = False

    def _behind(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the last answer's last token before, unless it ends the answer and the template writes that itself."""
        ids = inputs["input_ids"]
        if self.last is None or (self.last in end_tokens(self.owner.model) and int(ids[0, 0]) == self.last):
            return inputs
        before = {"input_ids": self.last, "attention_mask": 1}
        return {
            name: torch.cat([value.new_full((1, 1), before.get(name, 0)), value], 1)
            if value.shape == ids.shape
            else value
            for name, value in inputs.items()
        }

    def _ended(self, answer: Answer) -> None:
        """The answer as the model will be told it was; a step that failed leaves the cache between two states."""
        self.broken = self.broken or answer.reason == "error"
        said = self.owner.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        self.last = answer.tokens[-1] if answer.tokens else None
        self._free.release()

    def fork(self) -> "Conversation":
        """An independent continuation, its cache a copy."""
        self._take()
        try:
            other = Conversation(self.owner, self.cache.fork(), self.gates)
            other.messages, other.last = list(self.messages), self.last
        finally:
            self._free.release()
        return other

    def save(self, folder: str | Path) -> None:
        """Write the conversation to a folder, where the one before stays whole until this one is."""
        self._take()
        try:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"cache-{uuid4().hex}.safetensors"
            if self.messages:
                self.cache.save(file)
            state = {"format": 1, "gates": self.gates, "messages": self.messages, "last": self.last, "cache": file.name}
            write_json(folder / FILE, state)
            for old in set(folder.glob("cache-*.safetensors")) - {file}:
                old.unlink()
        finally:
            self._free.release()


def resumed(owner: "Pipeline", folder: str | Path) -> Conversation:
    """A saved conversation; one that was saved without the name of a gate set goes on under the first.

    Raises:
        ValueError: where there is none, or it fits neither the model nor a gate set.
    """
    try:
        state = json.loads((Path(folder) / FILE).read_text())
        name, messages, last, gates = state["cache"], state["messages"], state["last"], state.get("gates")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a saved conversation in {folder}, got none that can be read") from error
    found = owner.conversation(gates)
    if messages:
        found.cache.restore(Path(folder) / Path(name).name)
    found.messages, found.last = messages, last
    return found
