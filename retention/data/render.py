"""From examples to model inputs: chat template, processor, token spans of turns and evidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retention.data.collate import appended, left_pad
from retention.data.evidence import cell_tokens, marked, token_grids
from retention.data.example import Example, TextRef
from retention.data.template import MARKS, Template
from retention.types import Batch

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
    later: dict[str, Tensor] | None = None
    """The second prompts, left-padded, as the processor encodes them; None where there are none."""

    @property
    def lengths(self) -> list[int]:
        """Context tokens per row, padding excluded."""
        return self.inputs["attention_mask"].sum(1).tolist()


class Renderer:
    """Renders examples for one processor; the context ends before the first question's first token."""

    def __init__(self, processor: Any, visual_ids: Sequence[int]) -> None:
        self.template = Template(processor)
        self.processor, self.tokenizer, self.pad = processor, self.template.tokenizer, self.template.pad
        self.visual_ids = torch.tensor(list(visual_ids), dtype=torch.long)
        self._between, self._before_answer = self._glue()

    def _glue(self) -> tuple[str, str]:
        """What the chat template writes between an answer and the next question, and before an answer."""
        user = [{"role": "user", "content": [{"type": "text", "text": mark}]} for mark in MARKS]
        answer = {"role": "assistant", "content": [{"type": "text", "text": MARKS[1]}]}
        text = self.template.write([user[0], answer, user[2]], prompt=True)
        return text.split(MARKS[1])[1].split(MARKS[2])[0], text.split(MARKS[2])[1]

    def _context(self, example: Example) -> str:
        content = [
            {"type": "image"} if segment.kind == "image" else {"type": "text", "text": segment.payload}
            for segment in example.segments
        ]
        text = self.template.write(
            [{"role": "user", "content": [*content, {"type": "text", "text": MARKS[0]}]}], prompt=True
        )
        return text.split(MARKS[0])[0]

    def decode(self, tokens: list[int]) -> str:
        """What the model said, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def turns(self, example: Example) -> Turns:
        """Token ids of every turn; later questions begin with what follows an answer in the chat template."""
        questions = [
            self.template.ids((self._between if i else "") + turn.question + self._before_answer)
            for i, turn in enumerate(example.turns)
        ]
        return Turns(questions, [self.template.ids(turn.answer) for turn in example.turns])

    def _encode(self, text: list[str], examples: list[Example], *, first: bool) -> dict[str, Tensor]:
        """What the processor makes of prompts with the images of these examples; `first` begins a sequence."""
        kwargs: dict[str, Any] = {"text": text, "padding": True, "return_tensors": "pt"}
        images = [e.images for e in examples]
        if any(images):
            kwargs["images"] = images
        special = first and self.template.adds_special(text[0])
        return dict(self.processor(add_special_tokens=special, padding_side="left", **kwargs))

    def render(self, examples: list[Example]) -> Rendered:
        """Contexts as the processor encodes them, with turns and evidence positions, and the second prompts."""
        text = [self._context(e) for e in examples]
        inputs = self._encode(text, examples, first=True)
        visual = torch.isin(inputs["input_ids"], self.visual_ids)
        mask = inputs["attention_mask"].bool()
        evidence = [self._evidence(e, text[row], visual[row][mask[row]]) for row, e in enumerate(examples)]
        later = self._later(examples, text) if any(e.later for e in examples) else None
        return Rendered(inputs, visual, [self.turns(e) for e in examples], evidence, examples, later)

    def _later(self, examples: list[Example], contexts: list[str]) -> dict[str, Tensor]:
        """Second prompts: what the chat template writes on once their segments follow the context's."""
        whole = [self._context(e.whole()) for e in examples]
        assert all(text.startswith(start) for text, start in zip(whole, contexts, strict=True))
        text = [text.removeprefix(start) for text, start in zip(whole, contexts, strict=True)]
        return self._encode(text, [Example(e.id, e.later, [], e.query_position) for e in examples], first=False)

    def _evidence(self, example: Example, text: str, visual: Tensor) -> list[list[int] | None]:
        """Positions of each turn's evidence, or None where cells or characters cannot be mapped to tokens."""
        grids, found = token_grids(example, visual), []
        for turn in example.turns:
            places: list[list[int] | None] = []
            for ref in turn.evidence:
                if isinstance(ref, TextRef):
                    places.append(self._span(example, ref, text, visual))
                else:
                    places.append(None if grids is None else cell_tokens(grids, ref, example.meta["grid"]))
            known = [p for p in places if p is not None]
            mapped = len(known) == len(places) and (grids is not None or bool(places))
            found.append(sorted({i for p in known for i in p}) if mapped else None)
        return found

    def _span(self, example: Example, ref: TextRef, text: str, visual: Tensor) -> list[int] | None:
        """Tokens whose characters overlap a stretch of a text segment; images may take any number of tokens."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        told = self._context(marked(example, ref, MARKS[1:]))
        start, end = told.index(MARKS[1]), told.index(MARKS[2]) - len(MARKS[1])
        encoded = self.tokenizer(
            text, add_special_tokens=self.template.adds_special(text), return_offsets_mapping=True, return_tensors="pt"
        )
        words = ~torch.isin(encoded["input_ids"][0], self.visual_ids)
        offsets, places = encoded["offset_mapping"][0][words], torch.nonzero(~visual).flatten()
        if len(offsets) != len(places):
            return None
        return places[(offsets[:, 0] < end) & (offsets[:, 1] > start)].tolist()

    def training_batch(self, examples: list[Example]) -> Batch:
        """Contexts and second prompts with all turns and reference answers appended; labels on answers only, left-padded."""
        rendered = self.render([e.whole() for e in examples])
        more, labels = [], []
        for turns, length in zip(rendered.turns, rendered.lengths, strict=True):
            ids, marks = [], [IGNORE] * length
            for question, answer in zip(turns.questions, turns.answers, strict=True):
                ids += question + answer
                marks += [IGNORE] * len(question) + answer
            more.append(ids)
            labels.append(marks)
        inputs = appended(rendered.inputs, more, self.pad)
        return Batch(inputs, left_pad(labels, IGNORE), [e.id for e in examples], torch.tensor(rendered.lengths))
