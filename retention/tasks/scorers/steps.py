"""Procedures written out step by step."""

from retention.tasks.scorers.text import norm


def steps(prediction: str, answer: str) -> float:
    """Share of the reference's words that the prediction begins with: how far it got before the first error."""
    said, wanted, right = norm(prediction).replace(",", " ").split(), norm(answer).split(), 0
    for a, b in zip(said, wanted, strict=False):
        if a != b:
            break
        right += 1
    return right / max(1, len(wanted))
