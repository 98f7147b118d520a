"""What tasks tell of their answers besides the mean score, per setting: the worst turn, a penalty, a distance."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from retention.tasks import TASKS

Row = dict[str, Any]
SETTING = ("task", "policy", "scope", "protocol", "budget")


def further_rows(rows: Iterable[Row]) -> list[Row]:
    """One row per setting and figure that its task knows (`Task.further`).

    What only several presets of a task tell together stands under all their names.
    """
    cells: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        name = row["example_id"].partition("/")[0]  # of the task, whatever its preset is called
        if name in TASKS:
            setting = *(row[part] for part in SETTING[1:-1]), row["budget"]["requested"]
            cells[name, *setting][row["task"]].append(row)
    found = []
    for (name, *rest), presets in cells.items():
        told = {preset: TASKS[name].further(own) for preset, own in presets.items()}
        known = {figure for figures in told.values() for figure in figures}
        together = TASKS[name].further([row for own in presets.values() for row in own])
        told["+".join(presets)] = told.get("+".join(presets), {}) | {
            k: v for k, v in together.items() if k not in known
        }
        found += [
            dict(zip(SETTING, (task, *rest), strict=True)) | {"figure": figure, "value": value}
            for task, figures in told.items()
            for figure, value in figures.items()
        ]
    return found
