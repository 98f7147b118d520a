"""What the columns of a benchmark hold, and one sentence where a data set has others."""

from collections.abc import Callable, Mapping
from typing import Any


def _image(value: Any) -> bool:
    return isinstance(value, str | bytes) or (isinstance(value, dict) and not {"bytes", "path"}.isdisjoint(value))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "texts": _texts,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "image": _image,
    "list": lambda value: isinstance(value, list),
    "record": lambda value: isinstance(value, dict),
    "any": lambda value: value is not None,
    "answer": lambda value: isinstance(value, str | int | float) or _texts(value) or value == [],
}
"""Names of what a column may hold; `answer` is a text, a number or several texts, and `?` behind a name admits null."""


def column(row: Mapping[str, Any], names: str) -> Any:
    """The value of the first of some names, joined by `|`, that a row has; None without any."""
    return next((row[name] for name in names.split("|") if name in row), None)


def check_row(name: str, row: Mapping[str, Any], schema: Mapping[str, str]) -> None:
    """Compare a row with what is read of it.

    Raises:
        ValueError: for a column that is missing or of another type, with data set, column, expected and found.
    """
    for names, kind in schema.items():
        wanted = " or ".join(repr(known) for known in names.split("|"))
        if not any(known in row for known in names.split("|")):
            if kind.endswith("?"):
                continue
            raise ValueError(f"{name}: expected the column {wanted} ({kind}), found {', '.join(row) or 'no columns'}")
        value = column(row, names)
        if value is None and kind.endswith("?"):
            continue
        if not KINDS[kind.rstrip("?")](value):
            raise ValueError(f"{name}: expected {kind.rstrip('?')} in column {wanted}, found {_shown(value)}")


def _shown(value: Any) -> str:
    inner = f" of {type(value[0]).__name__}" if isinstance(value, list) and value else ""
    return "null" if value is None else f"{type(value).__name__}{inner}"
