"""From examples to model inputs: chat template, processor, token spans of turns and evidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retention.data.example import EvidenceRef, Example
from retention.types import Batch

_MARKS = ("\u2402first\u2402", "\u2402answer\u2402", "\u2402next\u2402")
IGNORE = -100


@dataclass
class Turns:
    """Token ids of one example's turns: what is read before each answer, and the reference answers."""

    questions: list[list[int]]
    answers: list[list[int]]


@dataclass
class Rendered:
    """A batch of contexts, left-padded, with their turns; `evidence[row][turn]` are positions or None."""

    inputs: dict[str, Tensor]
    visual: Tensor
    turns: list[Turns]
    evidence: list[list[list[int] | None]]
    examples: list[Example]

    @property
    def lengths(self) -> list[int]:
        """Context tokens per row, padding excluded."""
        return self.inputs["attention_mask"].sum(1).tolist()


class Renderer:
    """Renders examples for one processor; the context ends before the first question's first token."""

    def __init__(self, processor: Any, visual_ids: Sequence[int]) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.visual_ids = torch.tensor(list(visual_ids), dtype=torch.long)
        self.pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        )
        self._between, self._before_answer = self._glue()

    def _template(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _glue(self) -> tuple[str, str]:
        """What the chat template writes between an answer and the next question, and before an answer."""
        user = [{"role": "user", "content": [{"type": "text", "text": mark}]} for mark in _MARKS]
        answer = {"role": "assistant", "content": [{"type": "text", "text": _MARKS[1]}]}
        text = self._template([user[0], answer, user[2]], prompt=True)
        return text.split(_MARKS[1])[1].split(_MARKS[2])[0], text.split(_MARKS[2])[1]

    def _context(self, example: Example) -> str:
        content = [
            {"type": "image"} if segment.kind == "image" else {"type": "text", "text": segment.payload}
            for segment in example.segments
        ]
        text = self._template(
            [{"role": "user", "content": [*content, {"type": "text", "text": _MARKS[0]}]}], prompt=True
        )
        return text.split(_MARKS[0])[0]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        """What the model said, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def turns(self, example: Example) -> Turns:
        """Token ids of every turn; later questions begin with what follows an answer in the chat template."""
        questions = [
            self._ids((self._between if i else "") + turn.question + self._before_answer)
            for i, turn in enumerate(example.turns)
        ]
        return Turns(questions, [self._ids(turn.answer) for turn in example.turns])

    def render(self, examples: list[Example]) -> Rendered:
        """Contexts as the processor encodes them, with turns and evidence positions."""
        text, bos = [self._context(e) for e in examples], self.tokenizer.bos_token
        kwargs: dict[str, Any] = {"text": text, "padding": True, "return_tensors": "pt"}
        images = [e.images for e in examples]
        if any(images):
            kwargs["images"] = images
        inputs = dict(
            self.processor(add_special_tokens=not (bos and text[0].startswith(bos)), padding_side="left", **kwargs)
        )
        visual = torch.isin(inputs["input_ids"], self.visual_ids)
        evidence = [
            _evidence(example, visual[row][inputs["attention_mask"][row].bool()])
            for row, example in enumerate(examples)
        ]
        return Rendered(inputs, visual, [self.turns(e) for e in examples], evidence, examples)

    def training_batch(self, examples: list[Example]) -> Batch:
        """Contexts with all turns and reference answers appended; labels on answers only, left-padded."""
        rendered = self.render(examples)
        rows, labels = [], []
        for row, turns in enumerate(rendered.turns):
            ids = rendered.inputs["input_ids"][row][rendered.inputs["attention_mask"][row].bool()].tolist()
            marks = [IGNORE] * len(ids)
            for question, answer in zip(turns.questions, turns.answers, strict=True):
                ids += question + answer
                marks += [IGNORE] * len(question) + answer
            rows.append(ids)
            labels.append(marks)
        longest = max(map(len, rows))
        inputs = {k: v for k, v in rendered.inputs.items() if k not in ("input_ids", "attention_mask")}
        inputs["input_ids"] = torch.tensor([[self.pad] * (longest - len(r)) + r for r in rows])
        inputs["attention_mask"] = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
        padded = torch.tensor([[IGNORE] * (longest - len(r)) + r for r in labels])
        return Batch(inputs, padded, [e.id for e in examples])


def _evidence(example: Example, visual: Tensor) -> list[list[int] | None]:
    """Positions of each turn's evidence, or None where image cells cannot be mapped to tokens."""
    places = torch.nonzero(visual).flatten().tolist()
    images = example.images
    grid = example.meta.get("grid")
    if not images or grid is None or len(places) % len(images):
        return [None] * len(example.turns)
    per_image = len(places) // len(images)
    side = isqrt(per_image)
    if side * side != per_image:
        return [None] * len(example.turns)
    blocks = np.array(places).reshape(len(images), side, side)
    return [sorted({p for ref in turn.evidence for p in _cell(blocks, ref, grid)}) for turn in example.turns]


def _cell(blocks: np.ndarray, ref: EvidenceRef, grid: int) -> list[int]:
    """Tokens whose rectangle overlaps one cell of a `grid` x `grid` picture."""
    side = blocks.shape[1]

    def span(cell: int) -> slice:
        return slice(cell * side // grid, max(-(-(cell + 1) * side // grid), cell * side // grid + 1))

    return blocks[ref.image, span(ref.row), span(ref.column)].flatten().tolist()
