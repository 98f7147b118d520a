"""What tasks tell of their answers besides the mean score, per setting: the worst turn, a penalty, a distance."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from retention.tasks import TASKS

Row = dict[str, Any]
SETTING = ("policy", "scope", "protocol", "budget")


def further_rows(rows: Iterable[Row]) -> list[Row]:
    """One row per setting and figure that its task knows (`Task.further`).

    What only several presets of a task tell together stands under all their names.
    """
    cells: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        task = row["example_id"].partition("/")[0]  # as the task is registered, whatever its preset is called
        if task in TASKS:
            setting = row["policy"], row["scope"], row["protocol"], row["budget"]["requested"]
            cells[task, *setting][row["task"]].append(row)
    return [
        {"task": presets, **dict(zip(SETTING, setting, strict=True)), "figure": figure, "value": value}
        for (task, *setting), by_preset in cells.items()
        for presets, figure, value in _figures(task, by_preset)
    ]


def _figures(task: str, by_preset: Mapping[str, list[Row]]) -> Iterator[tuple[str, str, float]]:
    """Each preset's own figures, then those that only all of them together have."""
    told: set[str] = set()
    for preset, rows in by_preset.items():
        own = TASKS[task].further(rows)
        told |= set(own)
        yield from ((preset, figure, value) for figure, value in own.items())
    together = TASKS[task].further([row for rows in by_preset.values() for row in rows])
    yield from (("+".join(by_preset), figure, value) for figure, value in together.items() if figure not in told)
