"""The report of an evaluation: one self-contained HTML page, and the same tables and claims as Markdown."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retention.evaluation.claims import rules
from retention.evaluation.config import base_name
from retention.evaluation.equality import shown
from retention.evaluation.page import template
from retention.evaluation.tables import against_text, difference_text, markdown, sections, table_markdown
from retention.files import write_text

Row = dict[str, Any]
PICTURES = {
    "curves": "Accuracy over the part of the cache that is kept. Bands are 95% intervals over "
    "contexts and training seeds; the dashed line is the full cache, the dotted line is chance.",
    "pareto": "Accuracy over the physical bytes that a context's cache takes after eviction. Ringed settings are on the "
    "Pareto front: no policy is as accurate with fewer bytes. The dashed line is the full cache.",
    "deferred": "Accuracy by turn at one budget. The cache is evicted once, before the later "
    "questions are known, so what they ask for must have been kept on its own merit.",
    "depth": "Accuracy by the place of the evidence in the context at one budget, from the first token to the last.",
    "distance": "Accuracy by how many positions lie between the evidence and the end of its context, where the first question "
    "stands, at one budget.",
    "recall": "Evidence that is still held, over the part of the cache that is kept, beside the accuracy: `any` is the share "
    "that some layer and head holds, `weighted` the share by the full cache's attention on it.",
    "bytes": "What the cache of a context takes at one budget, by item: bars after eviction, marks at the peak.",
    "latency": "Time per token while answering over the length of the context, as measured in this run and in its batches: "
    "medians and quartiles.",
    "missing_mass": "Attention that the full cache gives to what a policy evicted, by layer, while reading the reference "
    "answers.",
    "survival": "What is kept of each layer and head. A global budget may give one head much and another nothing.",
    "survival_kinds": "What is kept of each layer and head, text and images apart.",
    "allocation": "Entries that each layer and head keeps of a context, on average over the contexts looked at.",
    "places": "What is kept of each part of the context, over all layers and heads, text and images apart.",
    "half_lives": "How long the gates let tokens live: half-lives of all tokens by modality, and their median, quartiles "
    "and ends in every layer.",
    "patches": "Images as the model saw them, and below what is kept at every budget: a token is the darker the fewer "
    "layers and heads hold it. Outlined tokens hold what the questions ask for.",
}
"""What each picture says; of several tasks, each one's pictures carry its name behind this one."""


def flat(manifest: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The entries of a nested manifest as dotted names and text; members of a list of tables by their number."""
    for name, value in manifest.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{name}", text


def told(manifest: Row) -> list[tuple[str, str]]:
    """A manifest's entries for a reader: without its caveats, and without settings of policies and tasks not used."""
    config = manifest.get("config", {})
    used = {"policy": {base_name(name) for name in config.get("policies", [])}, "task": set(config.get("tasks", []))}
    chosen = {
        name: {key: value for key, value in values.items() if key in used[name]} if name in used else values
        for name, values in config.items()
    }
    rest = {name: value for name, value in manifest.items() if name not in ("caveats", "config")}
    return [*flat(rest), *flat({"config": chosen})]


def differing(manifests: Mapping[str, Row]) -> list[tuple[str, list[str]]]:
    """Entries of several runs' manifests that are not the same in all of them, with every run's value."""
    entries_of = [dict(told(manifest)) for manifest in manifests.values()]
    names = dict.fromkeys(name for entries in entries_of for name in entries)
    values = {name: [entries.get(name, "-") for entries in entries_of] for name in names}
    return [(name, own) for name, own in values.items() if len(set(own)) > 1]


def _pictures(folder: Path) -> Iterator[Row]:
    """The pictures present, as base64 with their captions."""
    for name, caption in PICTURES.items():
        for file in sorted(folder.glob(f"{name}.png")) + sorted(folder.glob(f"{name}@*.png")):
            task = file.stem.partition("@")[2]
            png = file.read_bytes()
            wide = round(int.from_bytes(png[16:20], "big") / 1.5)
            data = base64.b64encode(png).decode("ascii")
            named = f"{task}: {caption}" if task else caption
            yield {"name": file.stem, "caption": named, "data": data, "width": wide}


def write_report(
    folder: Path,
    *,
    summary: Sequence[Row],
    manifests: Mapping[str, Row],
    title: str,
    claims: Sequence[Row] = (),
    groups: Sequence[Row] = (),
    contexts: Sequence[Row] = (),
    budget: str | None = None,
) -> Path:
    """One page report.html in the folder, with the pictures found there inside it.

    Args:
        folder: where the page goes and where curves.png and its like are looked for.
        summary: rows from summarise.
        manifests: by run, how the numbers came about; "caveats" (a list of sentences) head the page.
        title: of the page.
        claims: comparisons from compare_all.
        groups: rows from by_group.
        contexts: examples from browse.
        budget: the one whose examples are open.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"expected a folder for the report, got {folder}; create it first")
    text = template("report.html.j2").render(
        title=title,
        sections=list(sections(summary)),
        caveats=caveats(manifests),
        runs=list(manifests),
        differing=differing(manifests) if len(manifests) > 1 else [],
        manifest=told(next(iter(manifests.values()))),
        pictures=list(_pictures(folder)),
        claims=list(_claim_tables(claims)),
        rules=rules(claims),
        groups=list(_grouped(groups)),
        contexts=contexts,
        budget=budget,
    )
    whole = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair in an answer is no text
    write_text(folder / "report.html", whole)
    return folder / "report.html"


def _claim_tables(claims: Sequence[Row]) -> Iterator[Row]:
    """The comparisons of each task and protocol, of learned policies and of heuristics."""
    for task, protocol, learned in dict.fromkeys((c["task"], c["protocol"], c["learned"]) for c in claims):
        rows = [c for c in claims if (c["task"], c["protocol"], c["learned"]) == (task, protocol, learned)]
        name = f"{task}, {'learned policies' if learned else 'heuristics'}"
        yield {"name": name, "protocol": protocol, "learned": learned, "rows": rows}


def _grouped(groups: Sequence[Row]) -> Iterator[Row]:
    """The groups of each task and protocol."""
    for task, protocol in dict.fromkeys((row["task"], row["protocol"]) for row in groups):
        rows = [row for row in groups if (row["task"], row["protocol"]) == (task, protocol)]
        yield {"name": task, "protocol": protocol, "rows": rows}


def caveats(manifests: Mapping[str, Row]) -> list[str]:
    """What heads a report: the sentences of all runs, each once."""
    return list(dict.fromkeys(line for manifest in manifests.values() for line in manifest.get("caveats") or []))


def report_markdown(summary: Sequence[Row], claims: Sequence[Row], manifests: Mapping[str, Row], title: str) -> str:
    """Caveats, headline tables and comparisons as Markdown, for papers and pages."""
    told = [f"- {markdown(line)}" for line in caveats(manifests)]
    lines = [f"# {markdown(title)}", "", *told, "", table_markdown(summary)]
    if claims:
        head = ("task", "protocol", "budget", "policy", "against", "points [95%]", "p (Holm)", "verdict", "n", "seeds")
        lines += ["## What may be said", "", *(f"{rule}\n" for rule in rules(claims))]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for c in claims:
            named = (c["task"], c["protocol"], c["budget"], shown(c["policy"]), against_text(c))
            counted = f"{c['n']} in {c['n_contexts']}"
            found = (difference_text(c), f"{c['p_holm']:.2g}", c["verdict"], counted, str(c["n_seeds"] or "-"))
            lines.append("| " + " | ".join(map(markdown, (*named, *found))) + " |")
    return "\n".join(lines) + "\n"
