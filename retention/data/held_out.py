"""Rows kept from training, and as questions on contexts, for validation under eviction."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from jaxtyping import Int

from retention.data.chat import Chat
from retention.data.encode import Encoder
from retention.data.example import Example, Segment, Turn
from retention.data.media import BadRow, film, opened
from retention.data.plan import Source
from retention.data.source import Rows

ANSWER_TOKENS = 32
"""Longest answer that is asked for: what it begins with tells whether the context is still there."""


@dataclass
class Part:
    """Some rows of a source."""

    rows: Rows
    numbers: Int[np.ndarray, " part"]

    def __len__(self) -> int:
        """How many."""
        return len(self.numbers)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """One of them."""
        return self.rows[int(self.numbers[number])]


def split(sources: Sequence[Source], share: float, seed: int) -> tuple[list[Source], list[Source]]:
    """Sources without a share of their rows, at least one of each, and that share; fixed by the seed."""
    rest, kept = [], []
    for place, source in enumerate(sources):
        rows: Any = source.rows
        order = np.random.default_rng([seed, place, 3]).permutation(len(rows))
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        rest.append(replace(source, rows=Part(rows, np.sort(order[count:]))))
        kept.append(replace(source, rows=Part(rows, order[:count])))
    return rest, kept


def questions(sources: Sequence[Source], encoder: Encoder, most: int) -> list[Example]:
    """Held-out chats as contexts with one question each, bad rows left out; all with images, or all without.

    Raises:
        ValueError: where no row can be asked about.
    """
    kinds: dict[bool, list[Example]] = {True: [], False: []}
    for chat in _alternating(sources):
        try:
            encoder.row(chat)
            found = as_example(chat, encoder.rules.video_frames)
        except BadRow:
            continue
        kinds[bool(found.images)].append(found)
        if max(map(len, kinds.values())) == most:
            break
    chosen = max(kinds.values(), key=len)
    if not chosen:
        raise ValueError("expected questions with answers among the rows of data.held_out, got none; set it to 0")
    return chosen


def as_example(chat: Chat, video_frames: int) -> Example:
    """A chat up to its first answer: the last text before it is the question, what is before that the context.

    Raises:
        BadRow: for a chat that does not begin with a question and its answer, or an image that cannot be read.
    """
    roles = [message["role"] for message in chat.messages]
    start = 1 if roles[:1] == ["system"] else 0
    if roles[start : start + 2] != ["user", "assistant"]:
        raise BadRow("unknown schema", "no question and answer to begin with")
    parts = [part for message in chat.messages[: start + 1] for part in message["content"]]
    answer = "".join(part["text"] for part in chat.messages[start + 1]["content"])
    question = parts.pop()["text"] if len(parts) > 1 and parts[-1]["type"] == "text" else ""
    segments = []
    for part in parts:
        if part["type"] == "text":
            segments.append(Segment("text", part["text"]))
            continue
        video = part["type"] == "video"
        images = film(part["video"], video_frames).frames if video else [opened(part["image"])]
        segments += [Segment("image", np.asarray(image)) for image in images]
    turn = Turn(question, answer, scorer="overlap", max_new_tokens=ANSWER_TOKENS)
    return Example(chat.id, segments, [turn], "deferred_turn")


def _alternating(sources: Sequence[Source]) -> Iterator[Chat]:
    """Rows of every source in turn."""
    for numbers in zip_longest(*[range(source.length or 0) for source in sources]):
        for source, number in zip(sources, numbers, strict=True):
            if number is not None:
                try:
                    yield source.chat(number)
                except BadRow:
                    continue
