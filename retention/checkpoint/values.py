"""Dataclasses out of plain values that a stranger may have written: every field of its kind, nothing built before."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

LARGEST, LONGEST = 2**31, 4096
"""No size or count in an artefact is as large, and no list of settings as long."""
T = TypeVar("T")


def typed(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """An instance of a dataclass whose fields are plain values, lists and tuples of them.

    Raises:
        ValueError: for a missing or unknown field, or a value of another kind, naming it; and what the class refuses.
    """
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]  # any dataclass
    for name in values:
        if name not in known:
            raise ValueError(f"the artefact's {what} has fields this version does not know: {shown(name)}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"the artefact's {what} lacks {name}; export it again")
    return kind(**{name: _as(hints[name], value, f"{what}.{name}") for name, value in values.items()})


def shown(value: Any) -> str:
    """A value in a sentence: on one line, and short."""
    text = repr(value[:60] if isinstance(value, str | list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as(hint: Any, value: Any, name: str) -> Any:
    """The value, where it is of the annotated kind; lists become tuples where these are asked for."""
    inner = get_args(hint)
    match hint, value:
        case _ if get_origin(hint) in (Union, UnionType):
            return None if value is None and NoneType in inner else _as(inner[0], value, name)
        case _, list() if get_origin(hint) in (tuple, list) and len(value) <= LONGEST:
            return get_origin(hint)(_as(inner[0], item, name) for item in value)
        case (type(), bool() | str()) if hint is type(value):
            return value
        case (type(), int()) if hint is int and type(value) is int and abs(value) < LARGEST:
            return value
        case (type(), int() | float()) if hint is float and type(value) is not bool:
            if abs(value) < 1e300 and math.isfinite(value):
                return float(value)
    raise ValueError(f"expected {name} of the kind {getattr(hint, '__name__', hint)}, got {shown(value)}")
