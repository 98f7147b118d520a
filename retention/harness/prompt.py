"""A prompt as a context, which is evicted, and a question, which is read on top of what stays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt in two parts; the second is never empty."""

    context: tuple[int, ...]
    question: tuple[int, ...]
    agnostic: bool
    """Whether the context is evicted before anything of the question is seen; else the question was in the cache."""
    cut: int = 0
    """Tokens taken from the prompt's beginning, for its length."""

    @property
    def label(self) -> str:
        """As results name it."""
        return "agnostic" if self.agnostic else "aware"


def parts(text: str, marker: str | None) -> tuple[str, str, bool]:
    """A text without its markers, what stands before the last of them, and whether there was one."""
    if marker is None or marker not in text:
        return text, text, False
    before, _, behind = text.rpartition(marker)
    before = before.replace(marker, "")
    return before + behind, before, True


def divided(
    tokens: Sequence[int], text: str, marker: str | None, encode: Callable[[str], list[int]], longest: int
) -> Prompt:
    """Divide the tokens of a text (without its markers) behind the last marker; at most `longest` are left, the last.

    A token that straddles the marker belongs to the question, so that a prompt's tokens are the same with a marker as
    without. Without a marker the question is the last token alone: so even the first token of an answer is one of the
    evicted cache, which has seen the question.
    """
    cut = min(max(0, len(tokens) - longest), len(tokens) - 1)
    last = len(tokens) - 1
    _, before, agnostic = parts(text, marker)
    at = min(shared(tokens, encode(before)), last) if agnostic else last
    at = max(at, cut)
    return Prompt(tuple(tokens[cut:at]), tuple(tokens[at:]), agnostic, cut)


def shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(others)))


def batches(lengths: Sequence[int], size: int, *, alike: bool) -> list[list[int]]:
    """Numbers of rows that run together, the longest first; `alike` puts rows of one length together only.

    Rows without a context never share a batch with rows that have one.
    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        first = lengths[found[-1][0]] if found else None
        fits = first is not None and (first == lengths[number] or (lengths[number] > 0 and not alike))
        if fits and len(found[-1]) < size:
            found[-1].append(number)
        else:
            found.append([number])
    return found
