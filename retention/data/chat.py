"""A row of anybody's data set as a chat: messages of text, images and videos."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retention.data.media import BadRow, located

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
PLACES = ("<image>", "<video>")
"""What stands for an image or a video in the text of LLaVA's conversations."""
TEXT = "text"
"""Role of a text that is no chat: it is read as it is, without a template."""

Part = dict[str, Any]


@dataclass
class Chat:
    """One row: messages {"role", "content"}, a content being parts {"type": text, image or video, and its payload}."""

    id: str
    messages: list[dict[str, Any]]

    @property
    def plain(self) -> bool:
        """Whether it is a text and no chat."""
        return self.messages[0]["role"] == TEXT

    @property
    def parts(self) -> list[Part]:
        """Parts of all messages, in order."""
        return [part for message in self.messages for part in message["content"]]

    @property
    def characters(self) -> int:
        """Length of all texts."""
        return sum(len(part["text"]) for part in self.parts if part["type"] == "text")

    @property
    def media(self) -> list[Part]:
        """Images and videos, in order."""
        return [part for part in self.parts if part["type"] != "text"]


def read_chat(
    row: Mapping[str, Any], id: str, *, columns: Mapping[str, str] | None = None, folder: Path | None = None
) -> Chat:
    """A raw row as a chat.

    Known are `messages` (OpenAI, hub), LLaVA's `conversations`, `prompt` or `question` with `response` or `answer`,
    `text` alone, and `text` as the caption of `image`; with `image`, `images`, `video` or `videos` beside them.

    Args:
        row: values by column.
        id: names the row in batches and messages.
        columns: which column holds what a known name stands for, e.g. {"prompt": "instruction"}.
        folder: where relative paths start.

    Raises:
        BadRow: for an unknown schema, an empty text, a missing image, or images that do not fit their places.
    """
    row = {**row, **{name: row[column] for name, column in (columns or {}).items() if column in row}}
    kept = {kind: _listed(row, kind) for kind in ("image", "video")}
    messages = [_message(message) for message in _messages(row, captioned=any(kept.values()))]
    messages = [message for message in messages if message["role"] != "system" or message["content"]]
    _place(messages, kept)
    chat = Chat(id, messages)
    if not messages or any(not message["content"] for message in messages):
        raise BadRow("empty text")
    for part in chat.media:
        part[part["type"]] = located(part[part["type"]], folder)
    return chat


def _messages(row: Mapping[str, Any], *, captioned: bool) -> list[Mapping[str, Any]]:
    """Messages of a row in any of the known schemas, images not yet in their places."""
    for name in ("messages", "conversations", "conversation"):
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise BadRow("unknown schema", f"{name} is no list") from error
        if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
            return value
    asked, told = (next((row[n] for n in names if row.get(n) is not None), None) for names in _PAIRS)
    if asked is not None and told is not None:
        return [*_turns(asked, "user"), *_turns(told, "assistant")]
    if isinstance(row.get("text"), str):
        if captioned:
            return [{"role": "user", "content": ""}, {"role": "assistant", "content": row["text"]}]
        return [{"role": TEXT, "content": row["text"]}]
    raise BadRow("unknown schema", f"columns {', '.join(row) or 'none'}")


_PAIRS = (("prompt", "question", "instruction"), ("response", "answer", "completion", "output"))


def _turns(value: Any, role: str) -> list[Mapping[str, Any]]:
    """A prompt or response, which may be messages itself."""
    if isinstance(value, list) and value and all(isinstance(x, Mapping) and "role" in x for x in value):
        return value
    if isinstance(value, list):  # several reference answers of one question
        value = value[0] if value else ""
    return [{"role": role, "content": value}]


def _listed(row: Mapping[str, Any], kind: str) -> list[Any]:
    """Images or videos that lie beside the messages."""
    several, value = row.get(f"{kind}s"), row.get(kind)
    if several is not None:
        return list(several) if isinstance(several, list | tuple) else [several]
    if value is None or (isinstance(value, str) and not value):
        return []
    alone = kind == "video" or not isinstance(value, list | tuple)  # a list under `video` is the frames of one
    return [value] if alone else list(value)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Role and parts of a message; images without pixels are places to be filled."""
    role = message.get("role") or message.get("from")
    content = message["content"] if "content" in message else message.get("value")
    if not isinstance(role, str) or not isinstance(content, str | list):
        raise BadRow("unknown schema", f"a message with {', '.join(message) or 'nothing'}")
    role = ROLES.get(role, role)
    pieces = content if isinstance(content, list) else [{"type": "text", "text": content}]
    parts = [part for piece in pieces for part in _parts(piece, role)]
    return {"role": role, "content": parts}


def _parts(piece: Any, role: str) -> list[Part]:
    """One piece of a content; a text is cut at the places of its images, its ends cleaned where it is an answer."""
    if isinstance(piece, str):
        piece = {"type": "text", "text": piece}
    kind = str(piece.get("type", "text")) if isinstance(piece, Mapping) else "nothing"
    kind = kind.removesuffix("_url").removeprefix("input_")
    if kind in ("image", "video"):
        values = (piece.get(name) for name in (kind, f"{kind}_url", "url", "path", "bytes", "frames"))
        payload = next((value for value in values if value is not None), None)
        return [{"type": kind, kind: payload}]
    if kind != "text" or not isinstance(piece.get("text"), str):
        raise BadRow("unknown schema", f"a part of type {kind}")
    text: str = piece["text"]
    if role == "assistant":  # templates trim answers or not; trimmed before, they are the same under all
        text = text.strip()
        return [{"type": "text", "text": text}] if text else []
    cuts = re.split(f"({'|'.join(PLACES)})", text)
    if len(cuts) > 1:  # line breaks around a place are the schema's; templates write their own
        cuts = [cut.strip("\n") for cut in cuts]
    return [
        {"type": cut[1:-1], cut[1:-1]: None} if cut in PLACES else {"type": "text", "text": cut}
        for cut in cuts
        if cut.strip()
    ]


def _place(messages: list[dict[str, Any]], kept: Mapping[str, list[Any]]) -> None:
    """Put images and videos beside the messages into their places; without places they begin the first question."""
    for kind, payloads in kept.items():
        places = [p for m in messages for p in m["content"] if p["type"] == kind and p[kind] is None]
        if not places and payloads:
            asked = next((m for m in messages if m["role"] == "user"), None)
            if asked is None:
                raise BadRow("unknown schema", f"{kind}s without a question")
            asked["content"][:0] = [{"type": kind, kind: payload} for payload in payloads]
        elif len(places) != len(payloads):
            raise BadRow(f"missing {kind}", f"{len(places)} places for {len(payloads)} {kind}s")
        for place, payload in zip(places, payloads, strict=False):
            place[kind] = payload
