"""What `report_memory.py` says about its cells: claims with their verdicts, and the page."""

from collections.abc import Sequence
from typing import Any

from retention.provenance import hardware, package_versions

Cell = dict[str, Any]
Key = tuple[str, str, str, str]
MARGIN, POINT = 0.03, 0.01
SAME_BYTES = 1.02
"""How much larger a cell may be and still count as equal in bytes."""
LATER = slice(1, None)
DIAGNOSED = (
    ("missing_mass", "missing mass"), ("missing_mass_p90", "p90"), ("missing_mass_visual", "of vision"), ("missing_mass_text", "of text"),
    ("reactivation_rate", "reactivated"), ("reactivated_mass", "their mass"), ("reactivation_delay", "delay, tokens"), ("reactivated_evidence", "evidence among them"),
)  # fmt: skip
READ_BACK = (
    ("error_bare", "error without"), ("error", "error with"), ("recovered", "recovered"), ("recovered_reactivating", "where reactivating"),
    ("mass_slope", "mass slope"), ("mass_correlation", "mass correlation"),
)  # fmt: skip


def _alone(found: Any) -> list[Key]:
    return [key for key in found.cells if key[3] == "none" and key[1] != "full"]


def _with(key: Key, prefix: str, memory: str) -> Key:
    return key[0], f"{prefix}{key[1]}", key[2], memory


def suffices(found: Any, key: Key) -> bool:
    """Whether gates alone are as good as the full cache, their interval ending above -MARGIN."""
    return found.difference(key, (key[0], "full", "100%", "none"))[1] >= -MARGIN


def _told(gaps: Sequence[tuple[float, float, float]]) -> str:
    if not gaps:
        return "no cells"
    above, below = sum(low > 0 for _, low, _ in gaps), sum(high < 0 for _, _, high in gaps)
    mean = 100 * sum(gap for gap, _, _ in gaps) / len(gaps)
    return f"{mean:+.1f} points on average; interval above 0 in {above}, below 0 in {below} of {len(gaps)} cells"


def _verdict(gaps: Sequence[tuple[float, float, float]]) -> str:
    """Whether it is better: in every cell, in more than it is worse in, in none, or worse in as many or more."""
    above, below = sum(low > 0 for _, low, _ in gaps), sum(high < 0 for _, _, high in gaps)
    if not gaps:
        return "not measured"
    if not above and not below:
        return "no difference shown"
    return "yes" if above == len(gaps) else "in part" if above > below else "no, it is worse"


def gaps_of(found: Any, keys: Sequence[Key], memory: str, prefix: str, other: str = "") -> dict[Key, tuple]:
    """Paired differences of a memory's arm against gates alone, or against another of its arms, where both are."""
    found_of = {}
    for key in keys:
        mine, reference = _with(key, prefix, memory), _with(key, other, memory) if other else key
        if mine in found.cells and reference in found.cells:
            found_of[key] = found.difference(mine, reference)
    return found_of


def claims(found: Any) -> list[tuple[str, str, str, str]]:
    """Memory, what was asked, the verdict, and the numbers it rests on."""
    told, alone = [], _alone(found)
    enough = [key for key in alone if suffices(found, key)]
    tight = [key for key in alone if key not in enough]
    for memory in found.trained:
        gaps = list(gaps_of(found, enough, memory, "memory+").values())
        held = sum(gap >= -POINT for gap, _, _ in gaps)
        worst = min((gap for gap, _, _ in gaps), default=0.0)
        verdict = "not measured" if not gaps else "yes" if held == len(gaps) else "no" if not held else "in part"
        numbers = f"{held} of {len(gaps)} cells; the worst loses {max(0.0, -100 * worst):.1f} points"
        told.append((memory, "stays within 1 point of gates alone wherever those suffice", verdict, numbers))
        gaps = list(gaps_of(found, tight, memory, "memory+").values())
        told.append((memory, "helps at equal entries, where gates alone do not suffice", _verdict(gaps), _told(gaps)))
        where = [f"{k[0]} {k[1]} {k[2]}" for k, g in gaps_of(found, alone, memory, "memory+").items() if g[1] > 0]
        told.append((memory, "where it helps at equal entries", "-", ", ".join(where) or "nowhere"))
        gaps = list(gaps_of(found, tight, memory, "memory+", "refund+").values())
        told.append(
            (memory, "beats its own bytes spent on more entries (the same, tight cells)", _verdict(gaps), _told(gaps))
        )
        paid = gaps_of(found, alone, memory, "memory_paid+")
        fair = [
            gap
            for key, gap in paid.items()
            if _size(found, _with(key, "memory_paid+", memory)) <= SAME_BYTES * _size(found, key)
        ]
        left = (
            f"; {len(paid) - len(fair)} cells left out, whose budget cannot pay for the state"
            if len(paid) > len(fair)
            else ""
        )
        told.append(
            (memory, "beats gates alone when its bytes come out of the entries", _verdict(fair), _told(fair) + left)
        )
    return told


def _size(found: Any, key: Key) -> float:
    return found.cells[key]["kv_bytes_kept"] or 0


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _gap(found: Any, one: Key, other: Key) -> str:
    if one not in found.cells or other not in found.cells:
        return ""
    gap, low, high = (100 * x for x in found.difference(one, other))
    return f"{gap:+.1f} [{low:.0f}, {high:.0f}]"


def accuracy_table(found: Any, task: str, policy: str, budgets: Sequence[str]) -> list[str]:
    """One task and policy: memories and how they are paid for down, budgets across."""
    shown = [b for b in budgets if (task, policy, b, "none") in found.cells]
    lines = [f"### {task}, {policy}", "", f"| memory | arm | {' | '.join(shown)} |", f"|---|---|{'---:|' * len(shown)}"]

    def row(memory: str, name: str, prefix: str) -> str:
        entries = []
        for budget in shown:
            base, key = (task, policy, budget, "none"), (task, f"{prefix}{policy}", budget, memory)
            cell = found.cells.get(key)
            if cell is None:
                entries.append("")
                continue
            beside = "" if not prefix else f"<br>{_gap(found, key, base)}"
            later = _number(cell["accuracy_later_turns"])
            size = f"{_size(found, key) / 1024:.0f} KiB"
            entries.append(f"{cell['accuracy']:.3f} (later {later}){beside}<br>{size}")
        return f"| {memory} | {name} | {' | '.join(entries)} |"

    lines.append(row("none", "gates alone", ""))
    for memory in found.trained:
        for prefix, name in (
            ("memory+", "equal entries"),
            ("memory_paid+", "paid in entries"),
            ("refund+", "bytes as entries"),
        ):
            lines.append(row(memory, name, prefix))
    return [*lines, ""]


def diagnostic_tables(found: Any) -> list[str]:
    """What is missing and what comes back to matter, and how much of it each memory gives back."""
    lines = ["## What is missing", "", f"| task | policy | kept | {' | '.join(name for _, name in DIAGNOSED)} |", f"|---|---|---|{'---:|' * len(DIAGNOSED)}"]  # fmt: skip
    for key, seen in found.looks.items():
        if key[3] == "none":
            lines.append(
                f"| {key[0]} | {key[1]} | {key[2]} | {' | '.join(_number(seen[name]) for name, _ in DIAGNOSED)} |"
            )
    lines += ["", "Missing mass by layer and query head:", ""]
    for key, table in found.heads.items():
        rows = "; ".join(f"layer {i}: {', '.join(_number(x, 2) for x in row)}" for i, row in enumerate(table))
        lines.append(f"- {key[0]}, {key[1]}, {key[2]} kept: {rows}")
    lines += ["", "## What memories give back", "", f"| task | policy | kept | memory | {' | '.join(name for _, name in READ_BACK)} |", f"|---|---|---|---|{'---:|' * len(READ_BACK)}"]  # fmt: skip
    for key, seen in found.looks.items():
        if key[3] != "none":
            lines.append(f"| {' | '.join(key)} | {' | '.join(_number(seen[name]) for name, _ in READ_BACK)} |")
    return [*lines, ""]


def page(found: Any, budgets: Sequence[str]) -> str:
    """The whole page: conditions, claims, accuracy, diagnostics."""
    versions, machine = package_versions(), hardware()
    learned = [name for name, trained in found.trained.items() if trained]
    fixed = [name for name, trained in found.trained.items() if not trained]
    tasks = dict.fromkeys(key[0] for key in found.cells)
    seeds = max((cell["n_seeds"] for key, cell in found.cells.items() if key[1] != "full"), default=0)
    lines = [
        "# Memories of evicted tokens", "",
        f"Command: `python scripts/report_memory.py --memories {' '.join(found.trained)}`. "
        "RetentiveKV-style (arXiv 2605.04075), reconstructed: no code of that paper is public, and nothing here reproduces its "
        f"results. Trained on plain needles, on top of frozen gates: {', '.join(learned) or 'none'}. Without training: {', '.join(fixed) or 'none'}. Training seeds: {seeds}.", "",
        f"Machine: {machine['cpu']}, {machine['threads']} threads. torch {versions['torch']}, transformers {versions['transformers']}, retention {versions['retention']} at "
        f"{versions['git'][:10]} (uncommitted changes: {versions['git_dirty']}).", "",
        "Contexts are evicted before any question is read. Arms: gates alone; the memory on top of the same entries; the memory paid for in entries; no memory, its bytes spent on more "
        "entries. Differences are paired, in points, with 95% bootstrap intervals over contexts and seeds. The model is tiny: these are results about mechanisms, not about large models.", "",
        "## Claims", "", "| memory | question | verdict | measured |", "|---|---|---|---|",
        *(f"| {memory} | {asked} | **{verdict}** | {numbers} |" for memory, asked, verdict, numbers in claims(found)), "",
        f"Gates alone suffice where their interval against the full cache ends above {-100 * MARGIN:.0f} points: {sum(suffices(found, key) for key in _alone(found))} of {len(_alone(found))} cells.", "",
        "## Accuracy", "",
        "A cell: accuracy, in brackets that of later turns; difference to gates alone; bytes held after the eviction.", "",
    ]  # fmt: skip
    for task in tasks:
        full = found.cells[task, "full", "100%", "none"]
        lines += [
            f"Full cache on {task}: {full['accuracy']:.3f}, {_size(found, (task, 'full', '100%', 'none')) / 1024:.0f} KiB.",
            "",
        ]
        for policy in dict.fromkeys(key[1] for key in _alone(found) if key[0] == task):
            lines += accuracy_table(found, task, policy, budgets)
    return "\n".join([*lines, *diagnostic_tables(found)])
