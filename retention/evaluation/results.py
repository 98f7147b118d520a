"""From rows, manifests and diagnostics to everything a run leaves: summary, tables, pictures, report. Needs no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retention.evaluation import costs, plots, report
from retention.evaluation.browser import browse
from retention.evaluation.claims import compare_all
from retention.evaluation.config import prefix_of
from retention.evaluation.depth import by_depth, by_distance
from retention.evaluation.equality import plain
from retention.evaluation.evidence import recall_curves, recalled
from retention.evaluation.exports import table_latex, write_csv
from retention.evaluation.further import further_rows
from retention.evaluation.groups import by_group
from retention.evaluation.kept_images import drawable, kept_images
from retention.evaluation.looks import Look, load_lives, load_looks, load_shown
from retention.evaluation.maps import (
    allocation_heatmap,
    entries,
    half_life_histogram,
    place_curve,
    shares,
    shares_by_kind,
    survival_heatmap,
)
from retention.evaluation.pareto import pareto_curves
from retention.evaluation.protocol import Protocol
from retention.evaluation.statistics import summarise
from retention.evaluation.tables import claims_text, table_markdown, table_text
from retention.files import write_json, write_text
from retention.policies import POLICIES
from retention.policies.collect import COLLECTORS

Row = dict[str, Any]
PICTURED = 6
"""Tasks of a run that get pictures of their own, in the order of the run."""
SHOWN = 0.05
"""Share of the cache that pictures and examples are shown at, or the budget nearest to it."""


@dataclass
class Result:
    """What a run leaves: the table as text, the summary, and the files it wrote."""

    table: str
    summary: list[Row]
    files: list[Path]


@dataclass
class Source:
    """A folder with diagnostics, and how its policies are called now."""

    folder: Path
    names: Mapping[str, str] = field(default_factory=dict)

    def looks(self, task: str, protocol: str) -> list[Look]:
        """Its looks at a task under one protocol, full names on."""
        found = (look for look in load_looks(self.folder, task) if look.protocol == protocol)
        return [replace(look, policy=self.names.get(look.policy, look.policy)) for look in found]


def write_results(folder: Path, rows: Sequence[Row], manifests: Mapping[str, Row], sources: Sequence[Source]) -> Result:
    """Write all of it into the folder; tasks and protocols come in the order of the first manifest's config."""
    summary, depths, groups = summarise(rows), by_depth(rows), by_group(rows)
    distances, further = by_distance(rows), further_rows(rows)
    claims, budget = compare_all(rows, summary), picture_budget(summary)
    tasks = list(dict.fromkeys([*_configured(manifests, "tasks"), *(row["task"] for row in rows)]))
    held = {row["task"] for row in rows}
    tasks = [task for task in tasks if task in held]
    known = {row["protocol"] for row in rows}
    wanted = [str(Protocol.parse(text)) for text in _configured(manifests, "protocols")]
    protocol = next((name for name in wanted if name in known), rows[0]["protocol"])
    pictures = [plots.accuracy_curves(summary, folder / "curves.png", protocol=protocol)]
    pictures.append(pareto_curves(summary, folder / "pareto.png", protocol=protocol))
    pictures += _turns(summary, folder, tasks, budget)
    at_budget = [
        row
        for row in rows
        if row["protocol"] == protocol
        and row["error"] is None
        and (row["policy"] == "full" or row["budget"]["requested"] == budget)
    ]
    if len({row["seen"].bit_length() for row in at_budget if row.get("ms")}) > 1:  # contexts of several octaves
        pictures.append(costs.latency_curve(at_budget, folder / "latency.png"))
    contexts: list[Row] = []
    for task in tasks[:PICTURED]:
        end = f"@{task}" if len(tasks) > 1 else ""
        looks = _looks(sources, task, protocol, [row["policy"] for row in summary if row["seed_accuracy"]])
        pictures += _pictures(sources, task, looks, folder, end, budget)
        pictures += _costs([row for row in at_budget if row["task"] == task], folder, end)
        if recalled(summary, task, protocol):
            pictures.append(recall_curves(summary, folder / f"recall{end}.png", task, protocol=protocol))
        if any((r["task"], r["budget"], r["protocol"]) == (task, budget, protocol) for r in depths):
            told = {"budget": budget, "protocol": protocol}
            pictures.append(plots.depth_curve(depths, folder / f"depth{end}.png", task, **told))
        far = {r["part"] for r in distances if (r["task"], r["budget"], r["protocol"]) == (task, budget, protocol)}
        if len(far) > 1:
            told = {"budget": budget, "protocol": protocol}
            pictures.append(plots.distance_curve(distances, folder / f"distance{end}.png", task, **told))
        shown = next((found for source in sources if (found := load_shown(source.folder, task))), [])
        contexts += browse(task, shown, rows, looks, protocol)
    title = f"retention: {', '.join(tasks)}"
    page: Row = {"summary": summary, "claims": claims, "manifests": manifests, "title": title}
    parts = {"groups": groups, "depths": depths, "distances": distances, "further": further, "claims": claims}
    write_json(folder / "summary.json", {"rows": summary} | parts)
    write_text(folder / "table.md", table_markdown(summary))
    write_text(folder / "report.md", report.report_markdown(**page))
    write_text(folder / "table.tex", table_latex(summary))
    tables = [write_csv(folder / "summary.csv", summary), write_csv(folder / "claims.csv", claims)]
    report.write_report(folder, **page, groups=groups, contexts=contexts, budget=budget)
    texts = [folder / name for name in ("summary.json", "table.md", "report.md", "table.tex")]
    said = f"{table_text(summary)}\n{claims_text(claims)}"
    return Result(said.rstrip(), summary, [*texts, *tables, *pictures, folder / "report.html"])


def picture_budget(summary: Sequence[Row]) -> str:
    """The budget that pictures and sample answers are shown at: the one nearest to 5% of the context."""
    below = [row for row in summary if row["policy"] != "full"] or list(summary)
    return min(below, key=lambda row: abs(row["budget_fraction"] - SHOWN))["budget"]


def _configured(manifests: Mapping[str, Row], name: str) -> list[str]:
    return [value for manifest in manifests.values() for value in manifest.get("config", {}).get(name, [])]


def _looks(sources: Sequence[Source], task: str, protocol: str, trained: Sequence[str]) -> list[Look]:
    """Looks of all sources, each arm once, learned policies first, widest budget first."""
    found = {
        (look.policy, look.scope, look.budget): look for source in sources for look in source.looks(task, protocol)
    }
    return sorted(found.values(), key=lambda x: (x.policy not in trained, x.policy, x.scope, -int(x.kept.sum())))


def _pictures(
    sources: Sequence[Source], task: str, looks: list[Look], folder: Path, end: str, budget: str
) -> list[Path]:
    """What is drawn from the diagnostics of one task, as far as there are any."""
    drawn: list[Path] = []
    own = [look for look in looks if look.budget == budget]
    if own:
        drawn.append(survival_heatmap(shares(own), folder / f"survival{end}.png"))
        if held := entries(own):
            drawn.append(allocation_heatmap(held, folder / f"allocation{end}.png"))
        drawn.append(place_curve(own, folder / f"places{end}.png"))
        if all(own[0].seen.sum(0)):
            drawn.append(survival_heatmap(shares_by_kind(own), folder / f"survival_kinds{end}.png"))
    lives = next((found for source in sources if (found := load_lives(source.folder, task))), None)
    if lives is not None:
        drawn.append(half_life_histogram(lives, folder / f"half_lives{end}.png"))
    context = next((c for source in sources for c in load_shown(source.folder, task)[:1]), None)
    if context is not None and drawable(context) and looks:
        first = [look for look in looks if (look.policy, look.scope) == (looks[0].policy, looks[0].scope)]
        drawn.append(kept_images(context, first, folder / f"patches{end}.png"))
    return drawn


def _costs(own: Sequence[Row], folder: Path, end: str) -> list[Path]:
    """Bytes and missing mass of one task at one budget, as far as its rows tell them."""
    drawn: list[Path] = []
    if any("items" in row["bytes"] for row in own):
        drawn.append(costs.byte_bars(own, folder / f"bytes{end}.png"))
    if any(row.get("missing_mass") for row in own if row["policy"] != "full"):
        drawn.append(costs.missing_boxes(own, folder / f"missing_mass{end}.png"))
    return drawn


def _turns(summary: list[Row], folder: Path, tasks: Sequence[str], budget: str) -> list[Path]:
    """Accuracy by turn of the first task that has several."""
    several = {row["task"] for row in summary if row["accuracy_later_turns"] is not None and row["policy"] != "full"}
    task = next((name for name in tasks if name in several), None)
    if task is None:
        return []
    policies = _attentive([row["policy"] for row in summary])
    return [plots.deferred_curve(summary, folder / "deferred.png", task, budget=budget, policies=policies)]


def _attentive(named: Sequence[str]) -> list[str]:
    """Policies for the picture by turn: full, those that watch attention, and the gates' global pool."""
    watching = {name for name, x in COLLECTORS.items() if x is not None}
    kinds = {
        name: POLICIES[plain(name)]()
        for name in dict.fromkeys(named)
        if not prefix_of(plain(name)) and plain(name) in POLICIES
    }
    names = [name for name, kind in kinds.items() if kind.collector in watching or kind.selector == "global"]
    return ["full", *(names or dict.fromkeys(named))]
