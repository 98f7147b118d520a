"""Which training signal makes the best gates at equal data, steps and kept entries?

`python scripts/table_signals.py` evaluates gates of every objective on plain needles, under the same allocators, and
writes docs/results/signals.md. Gates are those of `scripts/table_policies.py` beside those of the presets that ask
with answers, trained where they are missing. What one step costs is measured side by side. `--quick` prints the same in
miniature; `--json PATH` also writes all cells and the machine.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from table_policies import BUDGETS, Bench, cube, gates_for, trained

from retention.config import compose
from retention.data.render import Renderer
from retention.evaluation.statistics import paired_difference, summarise
from retention.files import write_json, write_text
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.load import load_configured
from retention.objectives.base import Step
from retention.policies import policy_of
from retention.provenance import hardware, package_versions
from retention.training.datamodule import GateData
from retention.training.module import collect

TASK, TRAINING = "needles", "plain"
SIGNALS = (
    "distillation", "kvzap", "kvzap_answers", "fastkvzip", "fastkvzip_answers", "locret", "dms", "duo_attention",
)  # fmt: skip
ALLOCATORS = ("global", "uniform")
TIMED = 6
Cell = dict[str, Any]


def objective_of(signal: str) -> str:
    """The objective that a preset belongs to."""
    return signal.removesuffix("_answers")


def step_seconds(overrides: list[str]) -> float:
    """Seconds of a training step, the fastest of some after a first one, one thread."""
    config = compose("train", [*overrides, "logger=csv"])
    torch.set_num_threads(1)
    model, processor = load_configured(config.model)
    gates = RetentionGates.for_model(config.gate, model)
    renderer = Renderer(processor, family_of(model).visual_ids(model.config))
    data = GateData(config.task, renderer, config.data, config.model.prompt_style, TIMED + 1)
    spent = []
    for batch in data.batches():
        started = time.perf_counter()
        step = Step(batch.labels, torch.Generator().manual_seed(0))
        config.objective.loss(collect(model, gates, config.objective, batch.inputs, step))[0].loss().backward()
        spent.append(time.perf_counter() - started)
    return min(spent[1:])


def evaluate(bench: Bench, signal: str, gates: list[Path], budgets: tuple[str, ...]) -> tuple[list[Cell], dict]:
    """Cells of one signal under every allocator, and their scores by (signal, allocator, budget)."""
    cells, scores, base = [], {}, bench.base.cache
    policy = policy_of(objective_of(signal))
    for allocator in ALLOCATORS:
        bench.base.cache = replace(base, allocator=allocator)
        folder = f"signals_{signal}_{allocator}"
        bench.run(bench.config(TASK, ",".join(map(str, gates)), folder, policies=[policy], budgets=budgets))
        bench.base.cache = base
        rows = bench.rows(folder)
        order = {name: i for i, name in enumerate(sorted({row["example_id"] for row in rows}))}
        for cell in summarise(rows):
            key = (signal, allocator, cell["budget"]) if cell["policy"] != "full" else ("full", allocator, "100%")
            own = [r for r in rows if (r["policy"], r["budget"]["requested"]) == (cell["policy"], cell["budget"])]
            cells.append(cell | {"signal": key[0], "allocator": allocator})
            scores[key] = cube(own, order)
    return cells, scores


def page(
    cells: list[Cell], scores: dict, sizes: dict[str, int], cost: dict[str, float], budgets: tuple[str, ...]
) -> str:
    """Conditions, one table for each allocator, a reading."""
    versions, machine = package_versions(), hardware()
    full = next(cell for cell in cells if cell["signal"] == "full")
    parts = [
        "# Training signals on the embedded model", "",
        f"Command: `python scripts/table_signals.py`. Every row: gates of one objective, 400 steps of 8 contexts of plain needles, {full['n_contexts']} test contexts of "
        f"{full['n'] // full['n_contexts']} answers each, evicted before any question is read; full cache {full['accuracy']:.3f}. Every objective with its own preset of the demo's trainer "
        "(distillation: `experiment=plain`), its own start, and the gate architecture that it needs; `_answers`: asked by the tokens that answer, as distillation is scored there.", "",
        f"Machine: {machine['cpu']}, {machine['threads']} thread. torch {versions['torch']}, transformers {versions['transformers']}, "
        f"retention {versions['retention']} at {versions['git'][:10]} (uncommitted changes: {versions['git_dirty']}).", "",
        "A cell: accuracy, then the paired difference to distillation under the same allocator, in points, with its 95% bootstrap interval over contexts and seeds. "
        "Cost: seconds of one training step over distillation's, measured one after the other in this run.", "",
    ]  # fmt: skip
    for allocator in ALLOCATORS:
        name = "One pool for all layers and heads" if allocator == "global" else "Every head by itself"
        parts += [
            f"## {name}",
            "",
            f"| signal | gate parameters | cost | {' | '.join(budgets)} |",
            "|---|---:|---:|" + "---|" * len(budgets),
        ]
        for signal, size in sizes.items():
            shown = []
            for budget in budgets:
                key, best = (signal, allocator, budget), (SIGNALS[0], allocator, budget)
                text = f"{scores[key].mean():.3f}"
                if signal != SIGNALS[0]:
                    gap, low, high = (100 * x for x in paired_difference(scores[key].mean(0), scores[best].mean(0)))
                    text += f" {gap:+.1f} [{low:.1f}, {high:.1f}]"
                shown.append(text)
            parts.append(f"| {signal} | {size:,} | {cost[signal] / cost[SIGNALS[0]]:.2f} | {' | '.join(shown)} |")
        parts.append("")
    parts += ["## Reading", "", *reading(scores, tuple(sizes), budgets), ""]
    return "\n".join(parts)


def reading(scores: dict, signals: tuple[str, ...], budgets: tuple[str, ...]) -> list[str]:
    """The best signal at every budget, and those that cannot be told from it."""
    lines = []
    for allocator in ALLOCATORS:
        for budget in budgets:
            best = max(signals, key=lambda s: scores[s, allocator, budget].mean())
            near = []
            for other in signals:
                pair = (scores[s, allocator, budget].mean(0) for s in (best, other))
                if other != best and paired_difference(*pair)[1] <= 0:
                    near.append(other)
            lines.append(
                f"- {allocator}, {budget}: best is {best}; not told apart from it: {', '.join(near) or 'none'}."
            )
    return lines


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, time, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, printed")
    parser.add_argument("--json", type=Path, help="also write cells and machine to this file")
    parser.add_argument("--gates", type=Path, default=Path("outputs/table_main"), help="where table_main.py trained")
    parser.add_argument("--work", type=Path, default=Path("outputs/table_signals"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    signals, budgets = (SIGNALS[:2], BUDGETS[3:4]) if args.quick else (SIGNALS, BUDGETS)
    bench = Bench((args.work / "quick" if args.quick else args.work) / "eval", args.quick)
    cells, scores, sizes, cost = [], {}, {}, {}
    for signal in signals:
        name, overrides = gates_for(TRAINING, signal)
        seeds = (0,) if args.quick else (0, 1, 2)
        gates = [trained(args.gates, f"{name}_seed{seed}", overrides, seed, args.quick) for seed in seeds]
        found, by_key = evaluate(bench, signal, gates, budgets)
        cells, scores = cells + found, scores | by_key
        sizes[signal] = sum(p.numel() for p in RetentionGates.from_pretrained(gates[0]).stack.parameters())
        cost[signal] = step_seconds(overrides)
    text = page(cells, scores, sizes, cost, budgets)
    if args.json:
        write_json(args.json, {"rows": cells, "step_seconds": cost, "parameters": sizes, "machine": hardware()})
    print(text)
    if not args.quick:
        write_text(args.out / "signals.md", text)


if __name__ == "__main__":
    main()
