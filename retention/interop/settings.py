"""Settings of a foreign config: read off its file, each of the kind that an importer asks for."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retention.checkpoint import parsed, shown


def read_config(path: Path | str) -> dict[str, Any]:
    """The `config.json` beside a checkpoint.

    Raises:
        ValueError: when it is missing or no JSON object.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path).with_name("config.json")
    try:
        config = parsed(file.read_bytes(), file.name)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a config.json at {file}, got none that can be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(config).__name__}")
    return config


def real(config: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number.

    Raises:
        ValueError: for anything else.
    """
    value = config.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"expected {name} to be a number, got {shown(value)}")
    return float(value)


def count(config: Mapping[str, Any], name: str) -> int | None:
    """A whole number above 0; None where there is none.

    Raises:
        ValueError: for anything else.
    """
    value = config.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"expected {name} to be a whole number above 0 or nothing, got {shown(value)}")
    return value


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false.

    Raises:
        ValueError: for anything else.
    """
    value = config.get(name, default)
    if type(value) is not bool:
        raise ValueError(f"expected {name} to be true or false, got {shown(value)}")
    return value


def one_of(config: Mapping[str, Any], name: str, default: str | None, known: Iterable[str]) -> str:
    """A word among those that are known.

    Raises:
        ValueError: for anything else.
    """
    value, words = config.get(name, default), list(known)
    if value not in words:
        raise ValueError(f"expected {name} among {', '.join(words)}, got {shown(value)}")
    return value
