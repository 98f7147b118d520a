"""Needles in a haystack: keys with values, some asked for; the haystack is noise, prose, or needles itself."""

import uuid
from dataclasses import dataclass

import numpy as np

from retention.tasks.keyed import key_words
from retention.tasks.names import coined, number
from retention.tasks.ruler.draft import Draft, Draw, haystack, hidden

NEW_TOKENS = 128
QUALITIES = [
    "amber",
    "brisk",
    "calm",
    "dusty",
    "early",
    "faint",
    "gentle",
    "hollow",
    "ivory",
    "jolly",
    "keen",
    "lively",
    "mellow",
    "narrow",
    "olive",
    "plain",
]
THINGS = {
    "train": ["anchor", "basket", "candle", "drum", "engine", "feather", "garden", "hammer"],
    "val": ["island", "jacket", "kettle", "ladder", "mirror", "needle", "orchard", "pillow"],
    "test": ["quarry", "ribbon", "saddle", "tunnel", "umbrella", "valley", "window", "yard"],
}


@dataclass(frozen=True)
class Needles:
    """One of the eight needle tasks."""

    hay: str = "prose"
    """noise, prose or needles."""
    key: str = "words"
    """words (a quality and a thing, or a coined word among needles) or uuid."""
    value: str = "number"
    """number or uuid."""
    keys: int = 1
    values: int = 1
    """Values per key."""
    asked: int = 1

    def __call__(self, draw: Draw) -> Draft:
        """Keys and values first, then the haystack around them."""
        if draw.style == "symbolic":
            return self._symbolic(draw)
        fills = draw.units if self.hay == "needles" else 0
        keys = self._keys(draw, self.keys + fills)
        values = [[self._value(draw) for _ in range(self.values)] for _ in keys]
        kind = "number" if self.value == "number" else "code"
        told = [
            [f"A secret {kind} of {key} is {value}." for value in own] for key, own in zip(keys, values, strict=True)
        ]
        needles = [sentence for own in told[: self.keys] for sentence in own]
        hay = [sentence for own in told[self.keys :] for sentence in own] if fills else haystack(draw, self.hay)
        units, places = hidden(draw, hay, needles)
        several = self.asked * self.values > 1
        names = ", ".join(keys[: self.asked])
        question = (
            f"What are all the secret {kind}s of {names} that the text names? The secret {kind}s of {names} are"
            if several
            else f"What is the secret {kind} of {names} that the text names? The secret {kind} of {names} is"
        )
        wanted = self.asked * self.values
        answers = [value for own in values[: self.asked] for value in own]
        return Draft(units, places[:wanted], question, answers, NEW_TOKENS)

    def _symbolic(self, draw: Draw) -> Draft:
        """In the embedded model's words: a key and a digit, one asked for."""
        fills = draw.units if self.hay == "needles" else 0
        keys = key_words(draw.rng, min(78, self.keys + fills))
        told = [f"{key} {int(digit)}" for key, digit in zip(keys, draw.rng.integers(10, size=len(keys)), strict=True)]
        hay = told[self.keys :] if fills else haystack(draw, self.hay)
        units, places = hidden(draw, hay, told[: self.keys])
        return Draft(units, places[:1], f"<ask> {keys[0]}", [told[0][-1]], 1, scorer="symbol")

    def _keys(self, draw: Draw, count: int) -> list[str]:
        if self.key == "uuid":
            return [identifier(draw.rng) for _ in range(count)]
        if self.hay == "needles":
            return coined(draw.rng, draw.split, count, 3)
        things = THINGS[draw.split]
        pairs = draw.rng.permutation(len(QUALITIES) * len(things))[:count]
        return [f"{QUALITIES[int(i) // len(things)]}-{things[int(i) % len(things)]}" for i in pairs]

    def _value(self, draw: Draw) -> str:
        return identifier(draw.rng) if self.value == "uuid" else number(draw.rng, draw.split, 7)


def identifier(rng: np.random.Generator) -> str:
    """A random UUID of version 4."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


NIAH = {
    "niah_single_1": Needles(hay="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuid"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(hay="needles"),
    "niah_multikey_3": Needles(hay="needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, asked=4),
}
