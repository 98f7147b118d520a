"""Ask a solver that sees questions and nothing else: does the wording of a task give its answers away?

Usage: python scripts/question_only.py [needle jigsaw ...] [--draws 5000] [--seed 0] [--split test]
Names are those of `configs/task/`; without any, all procedural tasks. Tasks that have words for it are drawn in words.
The solver learns from one half of the contexts which answer each question has most often, and all questions together
where one is new, and answers the other half; then the halves change places. It fails, and the exit code is 1, where it
is more than 2 points above chance, or where one answer is that much likelier than a guess.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from contact_sheets import asked_for

from retention.data.example import Turn
from retention.tasks import Task
from retention.tasks.scorers import SCORERS

SLACK = 0.02


@dataclass
class Found:
    """Scores in [0, 1] of a guess, of the solver and of always giving the commonest answer, over `n` turns."""

    chance: float
    solver: float
    commonest: float
    n: int

    @property
    def leaks(self) -> bool:
        """Whether either is better than a guess by more than the slack."""
        return max(self.solver, self.commonest) > self.chance + SLACK


def _known(turns: Sequence[Turn]) -> tuple[dict[str, str], str]:
    """The commonest answer of every question, and of all."""
    of: dict[str, Counter[str]] = defaultdict(Counter)
    for turn in turns:
        of[turn.question][turn.reference] += 1
    every = Counter(turn.reference for turn in turns)
    return {question: told.most_common(1)[0][0] for question, told in of.items()}, every.most_common(1)[0][0]


def _score(turn: Turn, said: str) -> float:
    return SCORERS[turn.scorer](said, turn.answer, turn.choices)


def asked(task: Task, *, draws: int, seed: int = 0, split: str = "test") -> Found:
    """What the solver makes of `draws` contexts of a task."""
    if "symbolic" in getattr(task, "tiers", ()):
        task = replace(task, tier="symbolic")  # nothing is painted
    halves: list[list[Turn]] = [[], []]
    chance = task.chance
    for index in range(draws):
        example = task.example(seed, split, index, style="natural")
        chance = example.meta["chance"]
        halves[index % 2] += [turn for turn in example.turns if turn.scored]
    scores = []
    for learnt, own in (halves, halves[::-1]):
        of, every = _known(learnt)
        scores += [_score(turn, of.get(turn.question, every)) for turn in own]
    turns = halves[0] + halves[1]
    always = _known(turns)[1]
    return Found(chance, sum(scores) / len(turns), sum(_score(turn, always) for turn in turns) / len(turns), len(turns))


def main(arguments: list[str] | None = None) -> int:
    """Print a line per task; 1 where one leaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test")
    options = parser.parse_args(arguments)
    tasks = asked_for(parser, options.tasks)
    if options.draws < 2:
        parser.error(f"expected --draws of at least 2, half to learn from, got {options.draws}")
    leaks = False
    print(f"{'task':32} {'turns':>7} {'chance':>7} {'solver':>7} {'commonest':>9}")
    for name, task in tasks.items():
        found = asked(task, draws=options.draws, seed=options.seed, split=options.split)
        leaks |= found.leaks
        verdict = "  above chance" if found.leaks else ""
        print(
            f"{name:32} {found.n:7} {found.chance:7.3f} {found.solver:7.3f} {found.commonest:9.3f}{verdict}", flush=True
        )
    return int(leaks)


if __name__ == "__main__":
    sys.exit(main())
