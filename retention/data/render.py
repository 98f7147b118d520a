"""From examples to model inputs: chat template, processor, token spans of turns and evidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retention.data.collate import appended, left_pad
from retention.data.evidence import Words, aligned, cell_tokens, marked, token_grids
from retention.data.example import Example, Segment, TextRef
from retention.data.shorten import shortened
from retention.data.template import MARKS, Template
from retention.types import Batch

IGNORE = -100
BEHIND = "\n\n"
"""Between a question and the context on either side of it."""


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
        self._sizes: dict[tuple[int, ...], int] = {}

    def _glue(self) -> tuple[str, str]:
        """What the chat template writes between an answer and the next question, and before an answer."""
        user = [{"role": "user", "content": [{"type": "text", "text": mark}]} for mark in MARKS]
        answer = {"role": "assistant", "content": [{"type": "text", "text": MARKS[1]}]}
        text = self.template.write([user[0], answer, user[2]], prompt=True)
        return text.split(MARKS[1])[1].split(MARKS[2])[0], text.split(MARKS[2])[1]

    def _context(self, example: Example) -> str:
        segments = example.segments
        if example.query_position == "before" and example.turns:
            place = example.asked_behind
            question = Segment("text", (BEHIND if place else "") + example.turns[0].question + BEHIND)
            segments = [*segments[:place], question, *segments[place:]]
        if example.plain:
            return "".join(segment.payload for segment in segments)
        content = [
            {"type": "image"} if segment.kind == "image" else {"type": "text", "text": segment.payload}
            for segment in segments
        ]
        text = self.template.write(
            [{"role": "user", "content": [*content, {"type": "text", "text": MARKS[0]}]}], prompt=True
        )
        return text.split(MARKS[0])[0]

    def decode(self, tokens: list[int]) -> str:
        """What the model said, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def length(self, example: Example) -> int:
        """Tokens of a context and its first question, as the chat template writes them; images by their visual tokens."""
        text = self._context(example)
        special = self.tokenizer.num_special_tokens_to_add() if self.template.adds_special(text) else 0
        images = sum(self.image_tokens(image) for image in example.images)
        return special + len(self.template.ids(text)) + images + len(self.turns(example).questions[0])

    def turns(self, example: Example) -> Turns:
        """Token ids of every turn; questions behind an answer begin with what follows it in the chat template."""
        follows = (self._between, self._before_answer) if not example.plain else ("\n\n", "")
        asked = [turn.question for turn in example.turns]
        if example.query_position == "before":
            asked[0] = "\n" + example.turns[0].cue
        questions = [
            self.template.ids((follows[0] if i and not example.independent else "") + question + follows[1])
            for i, question in enumerate(asked)
        ]
        return Turns(questions, [self.template.ids(turn.reference) for turn in example.turns])

    def _encode(self, text: list[str], examples: list[Example], *, first: bool) -> dict[str, Tensor]:
        """What the processor makes of prompts with the images of these examples; `first` begins a sequence."""
        kwargs: dict[str, Any] = {"text": text, "padding": True, "return_tensors": "pt"}
        images = [e.images for e in examples]
        if any(images):
            kwargs["images"] = images
        special = first and self.template.adds_special(text[0])
        return dict(self.processor(add_special_tokens=special, padding_side="left", **kwargs))

    def image_tokens(self, image: np.ndarray) -> int:
        """Visual tokens of one image, by its size."""
        if image.shape not in self._sizes:
            alone = Example("", [Segment("image", image)], [], "after")
            ids = self._encode([self._context(alone)], [alone], first=True)["input_ids"]
            self._sizes[image.shape] = int(torch.isin(ids, self.visual_ids).sum())
        return self._sizes[image.shape]

    def render(self, examples: list[Example]) -> Rendered:
        """Contexts as the processor encodes them, with turns and evidence positions, and the second prompts.

        Examples that are longer than their limit are shortened before.
        """
        shown = next((e.id for e in examples if e.images or any(s.kind == "image" for s in e.later)), None)
        if self.template.text_only and shown is not None:
            raise ValueError(f"{shown} shows images and this model reads text alone; choose a vision-language model")
        examples = [shortened(e, self.template, self.image_tokens) for e in examples]
        text = [self._context(e) for e in examples]
        inputs = self._encode(text, examples, first=True)
        visual = torch.isin(inputs["input_ids"], self.visual_ids)
        mask = inputs["attention_mask"].bool()
        evidence = [
            self._evidence(e, text[row], visual[row][mask[row]], inputs["input_ids"][row][mask[row]])
            for row, e in enumerate(examples)
        ]
        later = self._later(examples, text) if any(e.later for e in examples) else None
        return Rendered(inputs, visual, [self.turns(e) for e in examples], evidence, examples, later)

    def _later(self, examples: list[Example], contexts: list[str]) -> dict[str, Tensor]:
        """Second prompts: what the chat template writes on once their segments follow the context's."""
        whole = [self._context(e.whole()) for e in examples]
        assert all(text.startswith(start) for text, start in zip(whole, contexts, strict=True))
        text = [text.removeprefix(start) for text, start in zip(whole, contexts, strict=True)]
        return self._encode(text, [Example(e.id, e.later, [], e.query_position) for e in examples], first=False)

    def _evidence(self, example: Example, text: str, visual: Tensor, ids: Tensor) -> list[list[int] | None]:
        """Positions of each turn's evidence, or None where cells or characters cannot be mapped to tokens."""
        grids, found = token_grids(example, visual), []
        refs = [ref for turn in example.turns for ref in turn.evidence if isinstance(ref, TextRef)]
        words = self._words(text, visual, ids) if refs else None
        starts = {segment: self._start(example, segment, text) for segment in {ref.segment for ref in refs}}
        for turn in example.turns:
            places: list[list[int] | None] = []
            for ref in turn.evidence:
                if isinstance(ref, TextRef):
                    places.append(None if words is None else words.span(*self._characters(example, ref, starts)))
                else:
                    places.append(None if grids is None else cell_tokens(grids, ref, example.meta["grid"]))
            known = [p for p in places if p is not None]
            mapped = len(known) == len(places) and (grids is not None or bool(places))
            found.append(sorted({i for p in known for i in p}) if mapped else None)
        return found

    def _words(self, text: str, visual: Tensor, ids: Tensor) -> Words | None:
        """Which characters of a prompt its tokens are; images may take any number of tokens and bring some of their own."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        encoded = self.tokenizer(
            text, add_special_tokens=self.template.adds_special(text), return_offsets_mapping=True, return_tensors="pt"
        )
        own = ~torch.isin(encoded["input_ids"][0], self.visual_ids)
        places = torch.nonzero(~visual).flatten()
        at = aligned(encoded["input_ids"][0][own].tolist(), ids[places].tolist())
        return None if at is None else Words(encoded["offset_mapping"][0][own].numpy(), places[at].numpy())

    def _start(self, example: Example, segment: int, text: str) -> int | None:
        """Where a text segment begins in the prompt; None where the chat template changes it."""
        payload = example.segments[segment].payload
        start = self._context(marked(example, TextRef(segment, 0, len(payload)), MARKS[1:])).index(MARKS[1])
        return start if text[start : start + len(payload)] == payload else None

    def _characters(self, example: Example, ref: TextRef, starts: dict[int, int | None]) -> tuple[int, int]:
        """Where a stretch of a text segment stands in the prompt."""
        start = starts[ref.segment]
        if start is not None:
            return start + ref.start, start + ref.end
        told = self._context(marked(example, ref, MARKS[1:]))
        return told.index(MARKS[1]), told.index(MARKS[2]) - len(MARKS[1])

    def training_batch(self, examples: list[Example]) -> Batch:
        """Contexts and second prompts with all turns and reference answers appended; labels on answers only, left-padded.

        Raises:
            ValueError: for an example at stretched positions, at which nothing is trained.
        """
        moved = next((e for e in examples if e.stretch != 1), None)
        if moved is not None:
            raise ValueError(
                f"expected examples at their own positions to train on, got {moved.id} at {moved.stretch:g} times them; "
                "choose another task for training"
            )
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
