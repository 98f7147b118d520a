"""Conversations that wait for their next question: found by what was said, bounded in bytes, the oldest go to disk."""

import hashlib
import json
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any
from uuid import uuid4

from retention.serving.conversation import FILE, Conversation
from retention.serving.pipeline import Pipeline


def digest(messages: list[dict[str, Any]], gates: str | None) -> str:
    """Names a chat by its content, images included, as a client sends it again and again, and by its gate set."""
    return hashlib.sha256(json.dumps([gates, messages], sort_keys=True, default=str).encode()).hexdigest()


class Pool:
    """Idle conversations by the digest of their messages, several of one where several said the same.

    Taking one out makes it the taker's alone.
    """

    def __init__(self, pipeline: Pipeline, max_bytes: int, folder: Path | None = None) -> None:
        """At most `max_bytes` of caches are held; what is more is saved below `folder`, or forgotten without one."""
        self.pipeline, self.max_bytes, self.folder = pipeline, max_bytes, folder
        self._idle: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """What idle conversations hold."""
        with self._lock:
            return self._held()

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, name: str) -> Conversation | None:
        """A conversation of this name, from memory or disk; None where there is none."""
        with self._lock:
            held = next((key for key in self._idle if key.startswith(name)), None)
            if held is not None:
                return self._idle.pop(held)
            saved = next(iter([] if self.folder is None else self.folder.glob(f"{name}*/{FILE}")), None)
            if saved is None:
                return None
            found = self.pipeline.resume(saved.parent)
            shutil.rmtree(saved.parent)
            return found

    def put(self, name: str, conversation: Conversation) -> None:
        """Keep a conversation for its next question; the longest idle ones make room."""
        if conversation.broken:
            return
        with self._lock:
            self._idle[f"{name}-{uuid4().hex}"] = conversation
            while self._held() > self.max_bytes:
                oldest, gone = self._idle.popitem(last=False)
                if self.folder is not None:
                    gone.save(self.folder / oldest)

    def _held(self) -> int:
        return sum(conversation.bytes for conversation in self._idle.values())
