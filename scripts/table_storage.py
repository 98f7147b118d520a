"""What does it cost to store gates in half precision or 8 bits?

`python scripts/table_storage.py` saves trained gates of the embedded model in every storage, loads them again, evicts
with them, and writes docs/results/storage.md. Gates are those of `scripts/table_main.py`, trained where they are
missing. `--quick` prints the same in miniature; `--json PATH` also writes all cells and the machine.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table_main import SEEDS
from table_policies import Bench, cube, gates_for, trained

from retention.checkpoint import STORAGES, TENSORS
from retention.evaluation.statistics import paired_difference, summarise
from retention.files import write_json, write_text
from retention.gates import RetentionGates
from retention.provenance import hardware, package_versions

TASKS = {"ask_subset": "ask_subset", "needles": "plain"}
"""Tasks by the training whose gates they take."""
POLICIES = ("db_trim_kv", "trim_kv")
BUDGETS = ("5%", "2.5%", "1.25%")
WHOLE = "int8, last projections too"
"""A variant that artefacts do not have: what is left in float32 because scores are read off it, rounded as well."""
Cell = dict[str, Any]


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Every row to 8 bits and back."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round() * scale


def stored(folder: Path, target: Path, storage: str) -> Path:
    """The gates of a folder, saved in another storage."""
    gates = RetentionGates.from_pretrained(folder)
    if storage == WHOLE:
        state = gates.stack.state_dict()
        last = [name.removesuffix("offset") + "weight" for name in state if name.endswith("offset")]
        gates.stack.load_state_dict(state | {name: rounded(state[name]) for name in last if name in state})
    gates.save_pretrained(target, storage="int8" if storage == WHOLE else storage)
    return target


def scored(folder: Path, hidden: torch.Tensor) -> torch.Tensor:
    """Scores of all layers for the same random inputs."""
    gates = RetentionGates.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack([gates.score(layer, hidden) for layer in range(gates.shape.num_layers)])


def evaluate(bench: Bench, task: str, gates: list[Path], storage: str, budgets: tuple[str, ...]) -> list[Cell]:
    """Cells of one storage on one task; its scores, [turns, seeds, contexts], beside each."""
    folder = f"{task}_{storage.replace(', ', '_').replace(' ', '_')}"
    bench.run(bench.config(task, ",".join(map(str, gates)), folder, policies=POLICIES, budgets=budgets))
    rows = bench.rows(folder)
    order = {name: i for i, name in enumerate(sorted({row["example_id"] for row in rows}))}
    cells = []
    for cell in summarise(rows):
        own = [r for r in rows if (r["policy"], r["budget"]["requested"]) == (cell["policy"], cell["budget"])]
        cells.append(cell | {"storage": storage, "task": task, "scores": cube(own, order)})
    return cells


def page(cells: list[Cell], files: list[Cell], budgets: tuple[str, ...], seeds: int) -> str:
    """Conditions, bytes, accuracies, a reading."""
    versions, machine = package_versions(), hardware()
    full = {cell["task"]: cell for cell in cells if cell["policy"] == "full"}
    shown = ", ".join(f"{task} {cell['accuracy']:.3f}" for task, cell in full.items())
    cells = [cell for cell in cells if cell["policy"] != "full"]
    some = next(iter(full.values()))
    lines = [
        "# Storage of gates on the embedded model", "",
        f"Command: `python scripts/table_storage.py`. Trained gates ({seeds} training seeds for each task), saved in every storage, loaded "
        f"again as float32, and used for physical eviction before any question is read: {some['n_contexts']} test contexts of "
        f"{some['n'] // some['n_contexts']} answers each. Full cache: {shown}.", "",
        f"Machine: {machine['cpu']}, {machine['threads']} threads. torch {versions['torch']}, transformers {versions['transformers']}, "
        f"retention {versions['retention']} at {versions['git'][:10]} (uncommitted changes: {versions['git_dirty']}).", "",
        "Score error: largest difference of a gate's score to float32 over random inputs, all layers, heads and seeds, over the "
        "standard deviation of the scores.", "",
        "| storage | bytes | of float32 | score error |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    whole = next(x["bytes"] for x in files if x["storage"] == STORAGES[0])
    for file in files:
        size = "- | - |" if file["bytes"] is None else f"{file['bytes']:,} | {file['bytes'] / whole:.2f} |"
        lines.append(f"| {file['storage']} | {size} {file['error']:.2g} |")
    lines += [
        "",
        "A cell: accuracy, then the paired difference to float32 in points with its 95% bootstrap interval over contexts.",
    ]
    worst: dict[str, float] = {}
    changed: dict[str, list[int]] = {}
    for task in full:
        for policy in POLICIES:
            mine = [cell for cell in cells if (cell["task"], cell["policy"]) == (task, policy)]
            lines += [
                "",
                f"## {task}, {policy}",
                "",
                f"| storage | {' | '.join(budgets)} |",
                "|---|" + "---|" * len(budgets),
            ]
            base = {cell["budget"]: cell for cell in mine if cell["storage"] == STORAGES[0]}
            for storage in dict.fromkeys(cell["storage"] for cell in mine):
                told = []
                for budget in budgets:
                    cell = next(c for c in mine if (c["storage"], c["budget"]) == (storage, budget))
                    text = f"{cell['accuracy']:.3f}"
                    if storage != STORAGES[0]:
                        pair = (c["scores"].mean(0) for c in (cell, base[budget]))
                        gap, low, high = (100 * x for x in paired_difference(*pair))
                        worst[storage] = min(worst.get(storage, np.inf), gap)
                        differ = cell["scores"] != base[budget]["scores"]
                        count = changed.setdefault(storage, [0, 0])
                        changed[storage] = [count[0] + int(differ.sum()), count[1] + differ.size]
                        text += f" {gap:+.2f} [{low:.2f}, {high:.2f}]"
                    told.append(text)
                lines.append(f"| {storage} | {' | '.join(told)} |")
    lines += ["", "## Reading", ""]
    lines += [
        f"- {name}: at worst {gap:+.2f} points against float32 in a cell; {changed[name][0]} of {changed[name][1]:,} answers "
        "are scored otherwise."
        for name, gap in worst.items()
    ]
    moved = {file["storage"]: file["error"] for file in files}
    lines.append(
        f"- Rounding last projections too moves scores {moved[WHOLE] / moved['int8']:.1f} times as far as int8 as it is, "
        "which leaves them in float32."
    )
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, store, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, printed")
    parser.add_argument("--json", type=Path, help="also write cells and machine to this file")
    parser.add_argument("--gates", type=Path, default=Path("outputs/table_main"), help="where table_main.py trained")
    parser.add_argument("--work", type=Path, default=Path("outputs/table_storage"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    work, budgets = args.work / "quick" if args.quick else args.work, BUDGETS[:1] if args.quick else BUDGETS
    seeds, tasks = (SEEDS[:1], list(TASKS)[:1]) if args.quick else (SEEDS, list(TASKS))
    bench, cells, errors, sizes = Bench(work / "eval", args.quick), [], {}, {}
    for task in tasks:
        name, overrides = gates_for(TASKS[task], "distillation")
        sources = [trained(args.gates, f"{name}_seed{seed}", overrides, seed, args.quick) for seed in seeds]
        for storage in (*STORAGES, WHOLE):
            place = work / "gates" / storage.replace(", ", "_").replace(" ", "_")
            folders = [stored(s, place / f"{name}_seed{n}", storage) for s, n in zip(sources, seeds, strict=True)]
            cells += evaluate(bench, task, folders, storage, budgets)
            for source, folder in zip(sources, folders, strict=True):
                width = RetentionGates.from_pretrained(source).shape.hidden_size
                hidden = torch.randn(1, 512, width, generator=torch.Generator().manual_seed(0))
                exact = scored(source, hidden)
                error = float((scored(folder, hidden) - exact).abs().max() / exact.std())
                errors[storage] = max(errors.get(storage, 0.0), error)
                sizes[storage] = None if storage == WHOLE else (folder / TENSORS).stat().st_size
    files = [{"storage": storage, "bytes": sizes[storage], "error": errors[storage]} for storage in sizes]
    text = page(cells, files, budgets, len(seeds))
    if args.json:
        plain = [{k: v for k, v in cell.items() if k != "scores"} for cell in cells]
        write_json(args.json, {"rows": plain, "files": files, "machine": hardware()})
    print(text)
    if not args.quick:
        write_text(args.out / "storage.md", text)


if __name__ == "__main__":
    main()
