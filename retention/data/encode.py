"""From chats to training batches: ids, labels on answers or on all text, images; every row on its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from retention.data.chat import Chat
from retention.data.collate import concatenated, left_pad
from retention.data.media import BadRow, Film, film, opened
from retention.data.render import IGNORE
from retention.data.spans import Span, token_spans, written
from retention.data.template import Template
from retention.types import Batch

LOSSES = ("answers", "all")
VIDEOS = ("frames", "native")


@dataclass
class Row:
    """One encoded row: what the processor makes of it alone, and its labels."""

    inputs: dict[str, Tensor]
    labels: Int[Tensor, " tokens"]
    id: str
    images: int

    @property
    def tokens(self) -> int:
        """Its length."""
        return len(self.labels)


@dataclass(frozen=True)
class Rules:
    """What a row may be, and what of it is learned."""

    loss_on: str = "answers"
    """answers (of the assistant, with the token that ends each) or all (every token but those of images)."""
    max_length: int | None = None
    """Most tokens of a row, those of images among them."""
    truncate: bool = False
    """Whether text beyond it is cut off; a row whose images would be cut is bad all the same."""
    max_images: int | None = None
    """Most images of a row, frames of videos among them."""
    video_frames: int = 8
    """Most frames of a video."""
    videos: str = "frames"
    """frames (a video is read as images) or native (as the processor reads videos)."""
    video_fps: float = 1.0
    """Frames per second of videos that do not say it."""


class Encoder:
    """Encodes chats for one processor, or one text model's tokenizer."""

    def __init__(self, processor: Any, visual_ids: Sequence[int], rules: Rules | None = None) -> None:
        self.template, self.visual, self.rules = Template(processor), list(visual_ids), rules or Rules()
        if self.rules.videos == "native" and getattr(processor, "video_processor", None) is None:
            raise ValueError(
                f"expected a processor that takes videos for data.videos=native, got {type(processor).__name__} without; "
                "install what it needs (pip install 'retention[video]'), or set data.videos=frames"
            )

    def row(self, chat: Chat) -> Row:
        """A chat's ids, mask, labels and images.

        Raises:
            BadRow: for a row without an answer where only answers are learned, with too many tokens or images, with
                an image that cannot be read, or that the processor refuses.
        """
        text, images, films, spans = self._written(chat)
        inputs = self._processed(text, images, films)
        ids = inputs["input_ids"][0]
        learned = torch.zeros(len(ids), dtype=torch.bool)
        if self.rules.loss_on == "all":
            learned = ~torch.isin(ids, torch.tensor(self.visual, dtype=ids.dtype))
        else:
            for first, last in token_spans(self.template, text, spans, ids.tolist(), self.visual):
                learned[first:last] = True
        count = len(images) + sum(len(one.frames) for one in films)
        row = Row(inputs, torch.where(learned, ids, IGNORE), chat.id, count)
        return self._bounded(row)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as one left-padded batch; images follow each other in the order of the rows."""
        told: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for row in rows for name in row.inputs):
            if any(name in row.inputs and _per_token(row, name) for row in rows):
                fill = self.template.pad if name == "input_ids" else 0
                values = [row.inputs[name][0].tolist() if name in row.inputs else [0] * row.tokens for row in rows]
                told[name] = left_pad(values, fill)
            else:
                told[name] = concatenated([row.inputs[name] for row in rows if name in row.inputs])
        labels = left_pad([row.labels.tolist() for row in rows], IGNORE)
        return Batch(told, labels, [row.id for row in rows])

    def _written(self, chat: Chat) -> tuple[str, list[Any], list[Film], list[Span]]:
        """The text of a chat, its images and videos decoded, and the characters of its answers."""
        answers = self.rules.loss_on == "answers"
        if answers and not any(message["role"] == "assistant" for message in chat.messages):
            raise BadRow("no answer")
        if chat.media and self.template.text_only:
            raise BadRow("images for a text model")
        if chat.plain:
            if chat.media:
                raise BadRow("unknown schema", "images in a text that is no chat")
            return "".join(part["text"] for part in chat.parts), [], [], []
        messages: list[dict[str, Any]] = []
        images: list[Any] = []
        films: list[Film] = []
        for message in chat.messages:
            content: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    content.append(part)
                    continue
                if message["role"] == "assistant":
                    raise BadRow("unknown schema", "images in an answer")
                if part["type"] == "image":
                    content.append({"type": "image"})
                    images.append(opened(part["image"]))
                    continue
                shown = film(part["video"], self.rules.video_frames)
                native = self.rules.videos == "native"
                content += [{"type": "video"}] if native else [{"type": "image"}] * len(shown.frames)
                films += [shown] if native else []
                images += [] if native else shown.frames
            if message["role"] == "assistant":
                content = [{"type": "text", "text": "".join(part["text"] for part in content)}]
            messages.append({"role": message["role"], "content": content})
        count = len(images) + sum(len(one.frames) for one in films)
        if self.rules.max_images is not None and count > self.rules.max_images:
            raise BadRow("too many images", f"{count}, at most {self.rules.max_images}")
        text, spans = written(self.template, messages)
        return text, images, films, spans

    def _processed(self, text: str, images: list[Any], films: list[Film]) -> dict[str, Tensor]:
        """What the processor makes of one row; special tokens that begin a sequence once."""
        given: dict[str, Any] = {"text": [text], "padding": True, "padding_side": "left", "return_tensors": "pt"}
        if images:
            given["images"] = [images]
        if films:
            given |= {
                "videos": [[np.stack([np.asarray(x) for x in one.frames]) for one in films]],
                "do_sample_frames": False,
            }
            given["video_metadata"] = [[self._told(one) for one in films]]
        try:
            made = self.template.processor(add_special_tokens=self.template.adds_special(text), **given)
        except Exception as error:  # a processor may fail in any way on an image it cannot take
            raise BadRow("refused by the processor", str(error).partition("\n")[0]) from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _told(self, one: Film) -> dict[str, Any]:
        """What a processor may ask about a video."""
        rate = one.rate or self.rules.video_fps
        times = {"fps": rate, "duration": one.total / rate}
        return {"total_num_frames": one.total, "frames_indices": one.places, **times}

    def _bounded(self, row: Row) -> Row:
        """The row within its longest length, and with something to learn."""
        limit = self.rules.max_length
        if limit is not None and row.tokens > limit:
            beyond = row.inputs["input_ids"][0, limit:]
            if not self.rules.truncate or torch.isin(beyond, torch.tensor(self.visual, dtype=beyond.dtype)).any():
                raise BadRow("too long", f"{row.tokens} tokens, at most {limit}")
            cut = {k: v[:, :limit] if _per_token(row, k) else v for k, v in row.inputs.items()}
            row = Row(cut, row.labels[:limit], row.id, row.images)
        if not bool((row.labels[1:] != IGNORE).any()):  # the first token is never predicted
            raise BadRow("nothing to learn", "no token left that counts")
        return row


def _per_token(row: Row, name: str) -> bool:
    return row.inputs[name].shape == (1, row.tokens)
