"""Whether policies are compared at equal entries and at equal bytes: measured, not nominal."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
TOLERANCE = 0.01
"""Relative difference up to which two sizes count as equal."""
FLOOR = "random"
"""What everything has to beat: the same protections, the rest by chance."""
NAMED = {FLOOR: "random+protect"}


def shown(policy: str) -> str:
    """A policy's name in tables: random keeps what every policy protects, and says so."""
    name = plain(policy)
    return NAMED.get(name, name) + policy.removeprefix(name)


def named_apart(policy: str, runs: str) -> str:
    """The name of a policy that is another in other runs."""
    return f"{policy} ({runs})"


def plain(policy: str) -> str:
    """A policy's name without the runs that `named_apart` put behind it."""
    return policy.partition(" (")[0]


def with_equality(summary: Sequence[Row]) -> list[Row]:
    """Summary rows with their entries by those asked for and their bytes by those of `random` at the same budget.

    Bytes are physical, after the last eviction. A ratio is missing where there is nothing to divide by.
    """
    bases = {_cell(row): row["kv_bytes_kept"] for row in summary if plain(row["policy"]) == FLOOR}
    return [row | _measured(row, bases.get(_cell(row))) for row in summary]


def _cell(row: Row) -> tuple[str, str, str]:
    return row["task"], row["protocol"], row["budget"]


def _measured(row: Row, base: float | None) -> Row:
    entries = _ratio(row["kept_fraction"], row["budget_fraction"])
    size = _ratio(row["kv_bytes_kept"], base)
    return {
        "entries_ratio": entries,
        "equal_entries": None if entries is None else abs(entries - 1) <= TOLERANCE,
        "bytes_ratio": size,
        "equal_bytes": None if size is None else abs(size - 1) <= TOLERANCE,
    }


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def unequal_note(summary: Sequence[Row]) -> str | None:
    """One sentence on rows that keep more or fewer entries than asked for; None where there are none."""
    off = [row for row in summary if row["policy"] != "full" and row["equal_entries"] is False]
    if not off:
        return None
    worst = max(off, key=lambda row: abs(row["entries_ratio"] - 1))
    return (
        f"{len(off)} rows keep over 1% more or fewer entries than asked for and are marked; the furthest is "
        f"{shown(worst['policy'])} at {worst['budget']} with {worst['entries_ratio']:.3f} times its budget."
    )
