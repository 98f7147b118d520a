"""JSON that a stranger may have written: parsed to plain values that every reader would read alike."""

import json
from typing import Any

DEEPEST = 32


def parsed(text: bytes, name: str, deepest: int = DEEPEST) -> Any:
    """JSON in UTF-8 that names nothing twice, is not nested deeply, and whose text can be written again.

    Of a name that is there twice readers would not agree which one counts; half of a surrogate pair is no character.

    Raises:
        ValueError: for anything else; `name` says what it was.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    _check(value, name, deepest)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _check(value: Any, name: str, depth: int) -> None:
    """Refuse what lies deeper than this, and text that is none."""
    match value:
        case str() if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{name} holds half of a character")
        case dict() | list() if depth == 0:
            raise ValueError(f"{name} is nested too deeply")
        case dict():
            for item in (*value, *value.values()):
                _check(item, name, depth - 1)
        case list():
            for item in value:
                _check(item, name, depth - 1)
