"""Accuracy by what benchmarks group their questions by: difficulty, length, subject, kind of question, depth."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from retention.tasks import TASKS

Row = dict[str, Any]
SETTING = ("task", "policy", "scope", "protocol", "budget")
MEAN = "mean"
"""The group that stands for all of a grouping, each counting alike, however many contexts it has."""


def by_group(rows: Iterable[Row]) -> list[Row]:
    """One row per setting, name of a grouping and group: accuracy, contexts, and shares that were readable or cut off.

    A context counts once, by the mean of its scored turns and training seeds; settings without groups have none. The last
    group of a grouping with several is their plain mean, by which authors average over sets. Presets of one benchmark that
    are evaluated together are the groups of a task of the benchmark's name.
    """
    rows = [row for row in rows if row["error"] is None and row.get("scored", True)]
    cells: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row, task, name, group in (*_grouped(rows), *_presets(rows)):
        setting = *(row[part] for part in SETTING[1:-1]), row["budget"]["requested"]
        cells[task, *setting, name][group].append(row)
    found = []
    for key, groups in cells.items():
        named = dict(zip((*SETTING, "by"), key, strict=True))
        own = [named | {"group": group} | _told(answers) for group, answers in groups.items()]
        found += [*own, named | _mean(own)] if len(own) > 1 else own
    return found


def _grouped(rows: list[Row]) -> Iterator[tuple[Row, str, str, str]]:
    for row in rows:
        for name, value in (row.get("groups") or {}).items():
            yield row, row["task"], name, str(value)


def _presets(rows: list[Row]) -> Iterator[tuple[Row, str, str, str]]:
    """Rows of benchmarks whose parts are presets, where several were evaluated; an example's id begins with its name."""
    presets: dict[str, set[str]] = defaultdict(set)
    own = [(row, row["example_id"].partition("/")[0]) for row in rows]
    own = [(row, name) for row, name in own if name in TASKS and TASKS[name].suite]
    for row, name in own:
        presets[name].add(row["task"])
    for row, name in own:
        if len(presets[name]) > 1:
            yield row, name, "preset", row["task"]


def _told(rows: list[Row]) -> Row:
    scores: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        scores[row["seed_data"], row["example_id"]].append(float(row["score"]))
    means = [sum(values) / len(values) for values in scores.values()]
    told = {"n_contexts": len(means), "accuracy": sum(means) / len(means)}
    return told | {name: _share(rows, name) for name in ("readable", "cut_off")}


def _mean(groups: list[Row]) -> Row:
    """The plain mean of groups; shares of those that have one."""
    told: Row = {"group": MEAN, "n_contexts": sum(row["n_contexts"] for row in groups)}
    for name in ("accuracy", "readable", "cut_off"):
        known = [row[name] for row in groups if row[name] is not None]
        told[name] = sum(known) / len(known) if known else None
    return told


def _share(rows: list[Row], name: str) -> float | None:
    known = [bool(row[name]) for row in rows if row.get(name) is not None]
    return sum(known) / len(known) if known else None
