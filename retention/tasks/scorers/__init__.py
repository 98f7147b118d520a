"""How an answer is scored: functions from prediction and reference to [0, 1], by name."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from retention.tasks.scorers import choice, lists, maths, numbers, overlap, steps, text, vqa

Answer = str | list[str]


@runtime_checkable
class Scorer(Protocol):
    """Scores a prediction against one reference or several; `choices` are a question's options, where it has any."""

    def __call__(self, prediction: str, answer: Answer, choices: Sequence[str] | None = None) -> float:
        """A score in [0, 1]."""


def _listed(answer: Answer) -> list[str]:
    return [answer] if isinstance(answer, str) else list(answer)


def best(score: Callable[[str, str], float]) -> Scorer:
    """The best score over the references."""

    def scorer(prediction: str, answer: Answer, choices: Sequence[str] | None = None) -> float:
        return max((score(prediction, reference) for reference in _listed(answer)), default=0.0)

    return scorer


def best_choice(score: Callable[[str, str, Sequence[str] | None], float]) -> Scorer:
    """The best score over the references, told the options."""

    def scorer(prediction: str, answer: Answer, choices: Sequence[str] | None = None) -> float:
        return max((score(prediction, reference, choices) for reference in _listed(answer)), default=0.0)

    return scorer


def whole(score: Callable[[str, Sequence[str]], float]) -> Scorer:
    """The score against all references together."""

    def scorer(prediction: str, answer: Answer, choices: Sequence[str] | None = None) -> float:
        return score(prediction, _listed(answer))

    return scorer


def first_line(inner: Scorer) -> Scorer:
    """A score of the first line alone, as LongBench reads few-shot sets."""

    def scorer(prediction: str, answer: Answer, choices: Sequence[str] | None = None) -> float:
        return inner(prediction.lstrip("\n").split("\n")[0], answer, choices)

    return scorer


SCORERS: dict[str, Scorer] = {
    "abstention": best(choice.abstention),
    "anls": best(text.anls),
    "choice_letter": best_choice(choice.choice_letter),
    "classification": best_choice(choice.classification),
    "classification_line": first_line(best_choice(choice.classification)),
    "code_similarity": best(overlap.code_similarity),
    "contains_all": whole(text.contains_all),
    "contains_any": best(text.contained),
    "exact": best(text.exact),
    "first_number": best(numbers.first_number),
    "function_match": best_choice(overlap.function_match),
    "index_only": best(lists.index_only),
    "index_triplet": best(lists.index_triplet),
    "last_integer": best(numbers.last_integer),
    "list_exact": whole(lists.list_exact),
    "list_soft": whole(lists.list_soft),
    "list_start": whole(lists.list_start),
    "math_equiv": best(maths.math_equiv),
    "numbers_share": best(lists.numbers_share),
    "numeric": best(numbers.numeric),
    "overlap": best(text.overlap),
    "qa_f1": best(overlap.qa_f1),
    "qa_f1_line": first_line(best(overlap.qa_f1)),
    "qa_f1_zh": best(overlap.qa_f1_zh),
    "relaxed": best(vqa.relaxed),
    "rouge_l": best(overlap.rouge_l),
    "rouge_l_line": first_line(best(overlap.rouge_l)),
    "rouge_l_zh": best(overlap.rouge_l_zh),
    "rouge_lsum": best(overlap.rouge_lsum),
    "steps": best(steps.steps),
    "short_answer": best(numbers.short_answer),
    "symbol": best(text.symbol),
    "token_in_split": best(text.token_in_split),
    "vqa_soft": whole(vqa.vqa_soft),
    "word_in": best(text.word_in),
    "yes_no": best(choice.yes_no),
}

_READ: dict[str, Callable[[str, Sequence[str] | None], Any]] = {
    "choice_letter": choice.chosen_letter,
    "index_triplet": lambda said, _: lists.integers(said) or None,
    "list_exact": lambda said, _: lists.read_list(said),
    "list_soft": lambda said, _: lists.read_list(said),
    "math_equiv": lambda said, _: maths.final_answer(said),
    "yes_no": lambda said, _: choice.said_yes_no(said),
}


def readable(name: str, prediction: str, choices: Sequence[str] | None = None) -> bool | None:
    """Whether an answer of the wanted form can be read from a prediction; None where any text is an answer."""
    read = _READ.get(name)
    return None if read is None else read(prediction, choices) is not None
