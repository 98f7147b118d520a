"""How benchmarks are worded: lettered options, cues, and texts with images in their places."""

import re
from collections.abc import Callable, Sequence

from retention.data.example import Segment, Turn
from retention.tasks.scorers.choice import LETTERS

LETTER = "Answer with the letter of the right option alone."
SHORT = "Answer with a single word or a short phrase."


def lettered(choices: Sequence[str]) -> str:
    """Options on lines of their own, each behind its letter."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def letter_of(answer: str | int, choices: Sequence[str]) -> str:
    """The letter of an answer given as letter, as number of the option from 0, or as its text.

    Raises:
        ValueError: for an answer that is none of the options.
    """
    if isinstance(answer, int):
        return LETTERS[answer]
    if answer in choices:
        return LETTERS[list(choices).index(answer)]
    bare = answer.strip().strip("().").upper()
    if len(bare) != 1 or bare not in LETTERS[: len(choices)]:
        raise ValueError(f"expected an answer among {list(choices)}, got {answer!r}")
    return bare


def choice_turn(question: str, choices: Sequence[str], answer: str | int, *, new: int = 16, cue: str = LETTER) -> Turn:
    """A question with lettered options, answered by a letter."""
    text = "\n".join(part for part in (question.strip(), lettered(choices), cue) if part)
    letter = letter_of(answer, choices)
    return Turn(text, letter, scorer="choice_letter", max_new_tokens=new, choices=list(choices))


def photograph_turn(question: str, answers: Sequence[str], hint: str = "") -> Turn:
    """A question about a photograph that ten people answered; the commonest answer is a right one."""
    told = max(answers, key=list(answers).count)
    cue = f"{hint} {SHORT}" if hint else SHORT
    return Turn(f"{question}\n{cue}", list(answers), scorer="vqa_soft", max_new_tokens=16, told=told)


def interleaved(text: str, place: str, picture: Callable[[str], Segment]) -> list[Segment]:
    """A text as segments, `picture` called with what each match of the pattern's group holds."""
    pieces = re.split(place, text)
    segments: list[Segment] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            segments.append(picture(piece))
        elif piece.strip():
            segments.append(Segment("text", piece))
    return segments
