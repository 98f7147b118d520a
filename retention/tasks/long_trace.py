"""A procedure to be written out step by step: every step needs the prompt and what was written before.

Decode-time eviction for models that do not reason; run it with `cache.evict_every`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Turn
from retention.tasks.context import Context
from retention.tasks.names import coined
from retention.tasks.procedural import Check, Procedural

KINDS = ("walk", "sum", "count")
MODULUS = 100


@dataclass
class LongTrace(Procedural):
    """`n_steps` steps of a walk along links, of running sums, or of counting on by the same number."""

    name: ClassVar[str] = "long_trace"
    chance: ClassVar[float] = 0.0
    tiers: ClassVar[tuple[str, ...]] = ("symbolic",)
    positions: ClassVar[tuple[str, ...]] = ("before", "after")
    evicts_answers: ClassVar[bool] = True

    tier: str = "symbolic"
    """There is text alone."""
    kind: str = "walk"
    """walk, sum or count."""
    n_steps: int = 64
    """Steps to write."""
    n_items: int = 64
    """Links of the walk; sums have one number per step."""

    def checks(self) -> tuple[Check, ...]:
        """What the settings have to satisfy."""
        return (
            *super().checks(),
            (self.kind in KINDS, f"task.kind among {', '.join(KINDS)}", self.kind),
            (self.n_steps >= 1, "task.n_steps of at least 1", self.n_steps),
            (2 <= self.n_items <= 1000, "task.n_items between 2 and 1000", self.n_items),
        )

    def draw(self, rng: np.random.Generator, context: Context) -> list[Turn]:
        """The items, then the one question."""
        return [{"walk": self._walk, "sum": self._sum, "count": self._count}[self.kind](rng, context)]

    def variant(self) -> str:
        """Kind, steps and items."""
        return f"{self.kind}-{self.n_steps}-{self.n_items}"

    def _turn(self, question: str, steps: list[str], evidence: list) -> Turn:
        tokens = 6 * len(steps) + 16
        return Turn(question, " ".join(steps), evidence, scorer="steps", max_new_tokens=tokens)

    def _walk(self, rng: np.random.Generator, context: Context) -> Turn:
        """One ring of links, told in random order."""
        names = coined(rng, context.split, self.n_items)
        refs = {}
        for i in rng.permutation(self.n_items).tolist():
            refs[i] = context.say(f"{names[i]} leads to {names[(i + 1) % self.n_items]}.")
        start = int(rng.integers(self.n_items))
        steps = [(start + i) % self.n_items for i in range(1, self.n_steps + 1)]
        used = sorted({(step - 1) % self.n_items for step in steps})
        question = (
            f"Start at {names[start]} and follow what each name leads to for {self.n_steps} steps. "
            "Write every name you come to, separated by spaces, and nothing else."
        )
        return self._turn(question, [names[i] for i in steps], [refs[i] for i in used])

    def _sum(self, rng: np.random.Generator, context: Context) -> Turn:
        """One number per step."""
        numbers = rng.integers(1, MODULUS, size=self.n_steps).tolist()
        refs = [context.say(f"Number {i + 1} is {number}.") for i, number in enumerate(numbers)]
        sums = [str(x % MODULUS) for x in np.cumsum(numbers).tolist()]
        question = (
            f"Add the numbers one after the other and write the last two digits of every sum, {self.n_steps} in all, "
            "separated by spaces, without leading zeros, and nothing else."
        )
        return self._turn(question, sums, list(refs))

    def _count(self, rng: np.random.Generator, context: Context) -> Turn:
        """Only two numbers of the prompt matter, all the others are what was written."""
        start, by = int(rng.integers(MODULUS)), int(rng.integers(2, 10))
        refs = [context.say(f"The count begins at {start}."), context.say(f"Every step adds {by}.")]
        steps = [str(start + by * i) for i in range(1, self.n_steps + 1)]
        question = (
            f"Count on for {self.n_steps} steps. Write every number you come to, separated by spaces, and nothing else."
        )
        return self._turn(question, steps, list(refs))
