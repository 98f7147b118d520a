"""What `table_policies.py` says about its cells: claims with their verdicts, and the page."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retention.provenance import hardware, package_versions

Cell = dict[str, Any]
ALPHA, MARGIN = 0.05, 0.03
LOSSLESS, FAILING = 0.99, 0.6
"""Share of the full cache: near-lossless as arXiv 2606.03075 has it, and failing."""
LOST, FASTER = 0.01, 1.5
COLUMNS = (
    "task", "protocol", "policy", "scope", "budget", "accuracy", "ci_low", "ci_high", "accuracy_first_turn", "accuracy_later_turns",
    "diff_full", "diff_full_low", "diff_full_high", "p_full", "reference_best", "diff_best", "diff_best_low", "diff_best_high", "p_best",
    "kept_fraction", "kv_bytes_full", "kv_bytes_kept", "kv_bytes_peak", "n", "n_contexts", "n_seeds",
)  # fmt: skip
LATER = slice(1, None)
DEFERRED = ("ask_subset", "needles", "recall", "recall_text")


def _counted(gaps: Sequence[tuple[float, float, float]]) -> tuple[str, str]:
    """Verdict on "the first is better", and how many intervals lie on which side of 0."""
    above, below = sum(low > 0 for _, low, _ in gaps), sum(high < 0 for _, _, high in gaps)
    told = (
        f"interval above 0 in {above}, across 0 in {len(gaps) - above - below}, below 0 in {below} of {len(gaps)} cells"
    )
    if not gaps:
        return "not measured", told
    if above and not below and above >= len(gaps) / 2:
        return "confirmed", told
    return ("refuted" if below >= above else "holds in part"), told


def _mean(gaps: Sequence[tuple[float, float, float]]) -> str:
    return f"{100 * sum(gap for gap, _, _ in gaps) / len(gaps):+.1f} points on average" if gaps else "no cells"


def claims(found: Any) -> list[tuple[str, str, str]]:
    """What was expected, the verdict, and the numbers it rests on."""
    told = []
    tight = ("10%", "5%", "2.5%")
    keys = [k for k in found.cells if k[1] == "agnostic" and k[2] == "db_trim_kv" and k[3] in tight]
    gaps = [found.difference(k, own) for k in keys if (own := (*k[:2], "trim_kv", k[3])) in found.cells]
    verdict, numbers = _counted(gaps)
    told.append(
        (
            "The same gates decide better in one global pool than per head (10% and less)",
            verdict,
            f"{_mean(gaps)}; {numbers}.",
        )
    )
    for protocol in ("agnostic", "aware"):
        keys = [
            k for k in found.cells if k[1] == protocol and k[2] == "db_trim_kv" and k[0] in DEFERRED and k[3] in tight
        ]
        pairs = [(k, (*k[:2], best, k[3])) for k in keys if (best := found.best_heuristic(k[0], k[1], k[3], LATER))]
        gaps = [found.difference(*pair, LATER) for pair in pairs]
        verdict, numbers = _counted(gaps)
        best = ", ".join(dict.fromkeys(other[2] for _, other in pairs))
        named = f"{_mean(gaps)}; {numbers}. Best without gates, chosen on these very answers: {best or 'none'}."
        told.append((f"Learned gates beat every heuristic on later turns, {protocol} (10% and less)", verdict, named))
    told += _tgv(found)
    told += _five_fold(found)
    return told


def _five_fold(found: Any) -> list[tuple[str, str, str]]:
    """A fifth of the context: what it costs in accuracy, and what it brings in decoding time on long contexts."""
    keys = [
        key for key in found.cells if key[1:] == ("agnostic", "db_trim_kv", "20%") and "diff_full" in found.cells[key]
    ]
    gaps = {key[0]: found.cells[key]["diff_full"] for key in keys}
    speed = found.speed
    if not gaps or not speed:
        return []
    gain = speed["full_ms"] / speed["ms"]
    lost, fast = [task for task, gap in gaps.items() if gap < -LOST], gain >= FASTER and not speed["noisy"]
    verdict = "confirmed" if fast and not lost else "holds in part" if fast or len(lost) < len(gaps) else "refuted"
    told = _list("", [f"{task} {100 * gap:+.1f} points" for task, gap in gaps.items()])
    timed = (
        f"One decoded token of a random Llama behind {speed['context']:,} tokens, batch {speed['batch']}, {speed['threads']} thread: "
        f"{speed['ms']:.1f} ms with 20% kept, {speed['full_ms']:.1f} ms with the fastest full cache ({speed['fastest']}), by turns: {gain:.2f} times as fast."
    )
    name = f"5x compression (20% kept, one pool) loses at most {100 * LOST:.0f} point and decodes at least {FASTER} times as fast at 8k tokens"
    return [(name, verdict, f"{told} {timed}")]


def _tgv(found: Any) -> list[tuple[str, str, str]]:
    """TGV-KV with the question in the prompt, without it, and where text outgrows the budget."""
    if not any(key[2] == "tgv_kv" for key in found.cells):
        return []
    told = []
    seen = slice(0, 1)
    for claim, protocol, turns, near, budget in (
        ("near-lossless at 5% when the question is in the prompt, on that question", "aware", seen, True, "5%"),
        ("near-lossless at 20%, where the text of these prompts fits, on that question", "aware", seen, True, "20%"),
        ("failing at 5% on later questions although the first was in the prompt", "aware", LATER, False, "5%"),
        ("failing at 5% when no question is in the prompt", "agnostic", slice(None), False, "5%"),
    ):
        shares = {}
        for task in dict.fromkeys(key[0] for key in found.cells if not key[0].startswith(("text_heavy", "recall"))):
            key, full = (task, protocol, "tgv_kv", budget), (task, protocol, "full", "100%")
            if key in found.scores and found.scores[full][turns].size and found.scores[full][turns].mean() > 0:
                shares[task] = float(found.scores[key][turns].mean() / found.scores[full][turns].mean())
        held = [share >= LOSSLESS if near else share < FAILING for share in shares.values()]
        verdict = (
            "not measured" if not held else "confirmed" if all(held) else "holds in part" if any(held) else "refuted"
        )
        told.append(
            (
                f"TGV-KV is {claim}",
                verdict,
                _list("share of full: ", [f"{t} {s:.0%}" for t, s in shares.items()]),
            )
        )
    said, verdicts = [], []
    for protocol in ("agnostic", "aware"):
        keys = [(task, protocol, "tgv_kv", "5%") for task in ("text_heavy", "text_heavy_facts")]
        if all(key in found.cells for key in keys):
            image, fact = (found.cells[key]["accuracy"] for key in keys)
            verdicts.append(image < fact - 0.2)
            said.append(f"{protocol}, 5%: images {image:.3f}, text {fact:.3f}")
    verdict = (
        "not measured"
        if not said
        else "confirmed"
        if all(verdicts)
        else "holds in part"
        if any(verdicts)
        else "refuted"
    )
    told.append(("TGV-KV loses the images where text alone exceeds the budget", verdict, _list("", said)))
    return told


def _list(start: str, parts: Sequence[str]) -> str:
    return start + ", ".join(parts) + "." if parts else "no cells."


def _size(count: float) -> str:
    return f"{count / 1024:.0f} KiB"


def _entry(found: Any, key: tuple[str, str, str, str]) -> str:
    if key in found.refused:
        return "n/a"
    if key not in found.cells:
        return ""
    cell = found.cells[key]
    lossless = cell["diff_full_low"] >= -MARGIN
    above = "+" if cell["p_best"] < ALPHA and cell["diff_best"] > 0 else ""
    number = f"**{cell['accuracy']:.3f}**" if lossless else f"{cell['accuracy']:.3f}"
    gaps = f"{100 * cell['diff_full']:+.0f} [{100 * cell['diff_full_low']:.0f}, {100 * cell['diff_full_high']:.0f}]"
    best = f"{100 * cell['diff_best']:+.0f} [{100 * cell['diff_best_low']:.0f}, {100 * cell['diff_best_high']:.0f}]"
    return f"{number}{above}<br>{gaps}<br>{best}"


def table(found: Any, task: str, protocol: str, budgets: Sequence[str]) -> list[str]:
    """One task under one protocol: policies down, best first; budgets and bytes across."""
    full = found.cells[task, protocol, "full", "100%"]
    keys = [*found.cells, *found.refused]
    shown = [b for b in budgets if any(k[:2] == (task, protocol) and k[3] == b for k in keys)]
    names = dict.fromkeys(k[2] for k in keys if k[:2] == (task, protocol) and k[2] != "full")

    def level(name: str) -> float:
        own = [found.cells[key]["accuracy"] for b in shown if (key := (task, protocol, name, b)) in found.cells]
        return sum(own) / max(1, len(own))

    middle = "5%" if "5%" in shown else shown[-1]
    lines = [
        f"### {task}, {protocol}", "",
        f"Full cache {full['accuracy']:.3f} [{full['ci_low']:.2f}, {full['ci_high']:.2f}], {_size(full['kv_bytes_kept'])}; "
        f"chance {full['chance']:.2f}; {full['n_contexts']} contexts, {full['n']} answers.", "",
        f"| policy | scope | {' | '.join(shown)} | kept at {middle} | peak at {middle} |",
        f"|---|---|{'---:|' * (len(shown) + 2)}",
    ]  # fmt: skip
    for name in sorted(names, key=level, reverse=True):
        at = found.cells.get((task, protocol, name, middle))
        some = next((found.cells[k] for b in shown if (k := (task, protocol, name, b)) in found.cells), None)
        scope = some["scope"].replace("_", " ") if some else ""
        sizes = [_size(at["kv_bytes_kept"]), _size(at["kv_bytes_peak"])] if at else ["", ""]
        learned = "" if not some else " (learned)" if some["learned"] else " (reference)" if some["reference"] else ""
        entries = [_entry(found, (task, protocol, name, b)) for b in shown]
        lines.append(f"| `{name}`{learned} | {scope} | {' | '.join([*entries, *sizes])} |")
    return [*lines, ""]


def page(found: Any, *, budgets: Sequence[str], pictures: Sequence[str]) -> str:
    """The whole page: conditions, claims, what does not apply, tables."""
    versions, machine = package_versions(), hardware()
    seeds = max((cell["n_seeds"] for cell in found.cells.values() if cell["learned"]), default=0)
    parts = [
        "# Every policy on the suite of the embedded model", "",
        "Command: `python scripts/table_policies.py`. Held-out scans (test split), physical eviction. `agnostic`: the context is evicted before any "
        "question is read; `aware`: the first question is read before the eviction and asked again after it. Questions and answers are held on top of the budget.", "",
        f"Machine: {machine['cpu']}, {machine['threads']} threads. torch {versions['torch']}, transformers {versions['transformers']}, "
        f"retention {versions['retention']} at {versions['git'][:10]} (uncommitted changes: {versions['git_dirty']}). Training seeds of the gates: {seeds}.", "",
        "The gates of `ask_subset` were trained on that task, all others on plain needles: no gate has seen a second prompt, votes that disagree, or text. "
        "The model is tiny: these are results about mechanisms, not about large models.", "",
        "A cell: accuracy; below it the paired difference to the full cache, then to the best policy without gates at that budget (chosen on the same answers), in points with "
        f"95% bootstrap intervals over contexts (and seeds). **Bold**: the interval against full ends above {-100 * MARGIN:.0f} points. `+`: above the best policy without gates, by a sign-flip "
        f"test over contexts at {ALPHA:g}, Holm-corrected over all policies and budgets of a table. All cells with p-values: policies.csv.", "",
        "## Claims", "", "| expected | verdict | measured |", "|---|---|---|",
        *(f"| {claim} | **{verdict}** | {numbers} |" for claim, verdict, numbers in claims(found)), "",
        "## What the weights cannot show", "",
        *(f"- {task}: the full cache scores {full['accuracy']:.3f} [{full['ci_low']:.2f}, {full['ci_high']:.2f}] at a chance of {full['chance']:.2f}. "
          "The model was never trained to do this, so that no policy can be told from another." for task, full in found.not_learnt.items()),
        "- The model reads a needle's answer three tokens behind its digit, where its layers have moved it, and not at the cells that show it: who keeps those cells "
        "alone fails, who keeps the tokens three behind does not (`tests/tasks/test_suite.py`). So `oracle`, which keeps the cells, is no upper bound here.", "",
    ]  # fmt: skip
    if found.refused:
        reasons: dict[tuple[str, str], list[str]] = {}
        for (task, protocol, name, budget), why in found.refused.items():
            reasons.setdefault((name, why), []).append(f"{task} {protocol} {budget}")
        parts += ["## Not applicable", "", "| policy | where | reason |", "|---|---|---|"]
        parts += [f"| `{name}` | {_where(cells)} | {why.replace('|', '/')} |" for (name, why), cells in reasons.items()]
        parts.append("")
    parts += [line for name in pictures for line in (f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", "")]
    parts += ["## Tables", ""]
    for task, protocol in dict.fromkeys(key[:2] for key in found.cells):
        parts += table(found, task, protocol, budgets)
    return "\n".join(parts)


def _where(cells: Sequence[str]) -> str:
    return ", ".join(cells[:4]) + (f" and {len(cells) - 4} more" if len(cells) > 4 else "")


def write_cells(found: Any, file: Path) -> None:
    """Every cell as a row of a CSV."""
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for cell in found.cells.values():
            writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in cell.items()})
