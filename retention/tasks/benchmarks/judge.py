"""A language model as judge of answers, at any address that speaks OpenAI's chat completions.

Its temperature is 0. What it is asked is worded here, in words of our own, so that a score is its judge's and its
prompts': rows, tables and manifest name the model, the version that the endpoint says it runs, and a hash of the prompts.
"""

import hashlib
import os
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.types import require

ATTEMPTS = 4
"""Tries of one question, with 1, 2 and 4 seconds in between."""


class Reply(NamedTuple):
    """What a judge said, and what the endpoint calls the model that said it."""

    text: str
    version: str


@dataclass
class Judge:
    """The model that is asked; without a name nobody is."""

    model: str | None = None
    """Name at the endpoint, best with its version; null leaves the score to rules."""
    base_url: str | None = None
    """Address of the endpoint, mostly ending in /v1."""
    key: str | None = None
    """Environment variable that holds the endpoint's key; null sends none."""
    seconds: float = 60.0
    """Longest wait for one reply."""

    def __post_init__(self) -> None:
        here = self.model is None or bool(self.base_url)
        known = self.model is None or self.key is None or self.key in os.environ
        require(
            [
                (here, "judge.base_url, the address of an endpoint, for a judge", self.base_url),
                (known, "an environment variable of the name in judge.key", self.key),
                (self.seconds > 0, "judge.seconds above 0", self.seconds),
            ]
        )

    def ask(self, prompt: str, most_tokens: int) -> Reply:
        """The reply to a prompt; the same prompt is asked once.

        Raises:
            ValueError: for an endpoint that cannot be reached or refuses.
        """
        return _asked(str(self.model), str(self.base_url), self.key, self.seconds, prompt, most_tokens)


@lru_cache(maxsize=2**16)
def _asked(model: str, base_url: str, key: str | None, seconds: float, prompt: str, most_tokens: int) -> Reply:
    from huggingface_hub import InferenceClient, errors

    secret = os.environ[key] if key else "none"  # without one the client would send the hub's own
    client = InferenceClient(base_url=base_url, api_key=secret, timeout=seconds)
    said = [{"role": "user", "content": prompt}]
    for attempt in range(ATTEMPTS):
        try:
            found = client.chat_completion(said, model=model, max_tokens=most_tokens, temperature=0.0)
            return Reply((found.choices[0].message.content or "").strip(), str(found.model or model))
        except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # of httpx or httpx2, by hub version
            status = getattr(getattr(error, "response", None), "status_code", None)
            refused = status is not None and 400 <= status < 500 and status != 429
            if refused or attempt == ATTEMPTS - 1:
                why = next(iter(str(error).splitlines()), type(error).__name__)
                raise ValueError(f"the judge {model} at {base_url} did not answer: {why}") from error
            time.sleep(2**attempt)
    raise AssertionError


@dataclass
class JudgedTask(DatasetTask):
    """A benchmark whose authors ask a language model; without one, rules score its answers and rows say so."""

    prompts: ClassVar[Mapping[str, str]]
    """What the judge is asked, by kind of question, with `{names}` to be filled in."""
    reply_tokens: ClassVar[int]
    """Longest reply of the judge."""

    judge: Judge = field(default_factory=Judge)
    """The language model that judges; without `judge.model` scores are not comparable with published ones."""

    @property
    def comparable(self) -> bool:
        """Whether there is a judge."""
        return self.judge.model is not None

    @abstractmethod
    def prompt(self, row: Row, prediction: str) -> str:
        """What the judge is asked about a prediction for a row of the data set."""

    @abstractmethod
    def verdict(self, row: Row, reply: str) -> float:
        """The score in [0, 1] that a judge's reply stands for."""

    @property
    def prompts_hash(self) -> str:
        """First 16 digits of the SHA-256 of all prompts."""
        return hashlib.sha256(repr(sorted(self.prompts.items())).encode()).hexdigest()[:16]

    def judged(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The judge's score in place of the rules', which stays beside it."""
        return [self._judged(row) for row in rows] if self.comparable else list(rows)

    def _judged(self, answer: dict[str, Any]) -> dict[str, Any]:
        row = self.rows[int(answer["example_id"].rpartition("/")[2])]
        reply = self.judge.ask(self.prompt(row, answer["prediction"]), self.reply_tokens)
        name = f"{self.judge.model} (version {reply.version}, prompts {self.prompts_hash})"
        told = {"name": name, "reply": reply.text, "score_by_rules": answer["score"]}
        return answer | {"score": self.verdict(row, reply.text), "judge": told}

    def provenance(self, seed: int, split: str, wanted: int) -> dict[str, Any]:
        """The judge and what it was asked, or that there was none."""
        told = {"model": self.judge.model, "prompts_hash": self.prompts_hash, "prompts": dict(self.prompts)}
        return super().provenance(seed, split, wanted) | {"judge": told if self.comparable else None}
