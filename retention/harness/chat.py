"""Chats with images as a context, which is evicted, and a question, which is read on top of what stays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retention.harness.prompt import Prompt, parts
from retention.serving.prompt import Message, Prompts

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """A chat in words, the part that is evicted and the rest, with their images."""

    context: str
    question: str
    images: list[Any]
    later: list[Any]
    agnostic: bool

    @property
    def manner(self) -> tuple[bool, ...]:
        """What chats share that run together."""
        return self.agnostic, bool(self.context), bool(self.images), bool(self.later)


class Chats:
    """Divides chats behind the last marker in them, as a processor's chat template writes them."""

    def __init__(self, processor: Any, marker: str | None) -> None:
        self.prompts, self.marker = Prompts(processor), marker
        self.template = self.prompts.template

    def read(self, messages: Any) -> tuple[list[Message], list[Any]]:
        """Messages with places for images, and the images.

        Raises:
            ValueError: for messages that cannot be read.
        """
        return self.prompts.read(messages)

    def written(self, messages: Sequence[Message], images: list[Any]) -> Written:
        """A whole chat up to where the answer begins; without a marker all of it is context."""
        text, before, agnostic = parts(self.template.write(messages, prompt=True), self.marker)
        first = self._shown(messages) if agnostic else len(images)
        return Written(before, text[len(before) :], images[:first], images[first:], agnostic)

    def _shown(self, messages: Sequence[Message]) -> int:
        """Images before the last marker."""
        content = [part for message in messages for part in message["content"]]
        last = max(
            i for i, part in enumerate(content) if part["type"] == "text" and (self.marker or "") in part["text"]
        )
        return sum(part["type"] == "image" for part in content[:last])

    def inputs(self, chats: Sequence[Written]) -> tuple[Inputs | None, Inputs]:
        """Contexts and questions of chats of one manner; of one without a marker the last token is the question."""
        if not chats[0].context:
            return None, self._encoded([c.question for c in chats], [c.later for c in chats], first=True)
        contexts = self._encoded([c.context for c in chats], [c.images for c in chats], first=True)
        if chats[0].agnostic:
            return contexts, self._encoded([c.question for c in chats], [c.later for c in chats], first=False)
        shape = contexts["input_ids"].shape
        told = {name: value for name, value in contexts.items() if value.shape == shape}
        last = {name: value[:, -1:] for name, value in told.items()}
        return contexts | {name: value[:, :-1] for name, value in told.items()}, last

    def following(
        self, before: Sequence[Message], new: list[Message], images: list[Any], last: int, *, ended: bool
    ) -> Inputs:
        """What stands between an answer and the next one; `last` is the token of the answer that no cache has seen.

        Where it ended the answer, and the template begins with it, it is not written twice.
        """
        plain = [self._unmarked(message) for message in new]
        inputs = self.prompts.following([self._unmarked(message) for message in before], plain, images)
        ids = inputs["input_ids"]
        if ended and int(ids[0, 0]) == last:
            return inputs
        ahead = {"input_ids": last, "attention_mask": 1}
        told = {name: value for name, value in inputs.items() if value.shape == ids.shape}
        begun = {n: torch.cat([value.new_full((1, 1), ahead.get(n, 0)), value], 1) for n, value in told.items()}
        return inputs | begun

    def _unmarked(self, message: Message) -> Message:
        content = [
            part | {"text": parts(part["text"], self.marker)[0]} if part["type"] == "text" else part
            for part in message["content"]
        ]
        return {"role": message["role"], "content": content}

    def _encoded(self, texts: list[str], images: Sequence[list[Any]], *, first: bool) -> Inputs:
        """Left-padded inputs by the processor; `first` begins a sequence."""
        given: dict[str, Any] = {"text": texts, "padding": True, "padding_side": "left", "return_tensors": "pt"}
        if any(images):
            given["images"] = [list(row) for row in images]
        made = self.template.processor(add_special_tokens=first and self.template.adds_special(texts[0]), **given)
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def prompts_of(chats: Sequence[Written], contexts: Inputs | None, questions: Inputs) -> list[Prompt]:
    """Token ids of chats, for the record."""
    asked = [_own(questions, row) for row in range(len(chats))]
    read = [() if contexts is None else _own(contexts, row) for row in range(len(chats))]
    return [Prompt(a, b, chat.agnostic) for a, b, chat in zip(read, asked, chats, strict=True)]


def _own(inputs: Inputs, row: int) -> tuple[int, ...]:
    """A row's token ids, padding excluded."""
    return tuple(inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist())
