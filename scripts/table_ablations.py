"""What each part of the gates' training is worth: the papers' ablations and ours, on the embedded model.

`python scripts/table_ablations.py` trains every row of the table with three seeds, evaluates all of them under hard
eviction on the demo's task, prints the table and writes docs/results/ablations.md and ablations.csv. A stopped run goes
on where it was. `--quick` prints the same in miniature; `--json PATH` also writes all cells and the machine.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ablations_page import page, table, verdicts, write_cells
from table_policies import Bench, cube, trained

from retention.config import compose
from retention.evaluation.statistics import holm, paired_difference, paired_p_value, summarise
from retention.files import write_json, write_text
from retention.gates import RetentionGates
from retention.provenance import hardware

SEEDS = (0, 1, 2)
STEPS = 100
TASK = "ask_subset"
BUDGETS = ("10%", "5%", "2.5%", "1.25%")
POLICIES = ("db_trim_kv", "trim_kv")
DEMO = "demo"


@dataclass(frozen=True)
class Ablation:
    """A row: what differs from the demo, in training or while evicting."""

    name: str
    group: str
    train: tuple[str, ...] = ()
    """Overrides of train.py; none takes the gates of the demo."""
    evict: tuple[str, ...] = ()
    """Overrides of eval.py."""


ABLATIONS = (
    Ablation(DEMO, "reference"),
    Ablation("without_kl", "losses", ("experiment=without_kl",)),
    Ablation("without_ntp", "losses", ("experiment=without_ntp",)),
    Ablation("without_capacity", "losses", ("experiment=without_capacity",)),
    Ablation("local_capacity", "losses", ("experiment=local_capacity",)),
    Ablation("published_offset", "start", ("experiment=published_offset",)),
    Ablation("narrow_gate", "gate", ("experiment=narrow_gate",)),
    Ablation("linear_gate", "gate", ("experiment=linear_gate",)),
    Ablation("rows_sharing", "gate", ("experiment=rows_sharing",)),
    Ablation("trim_kv", "gate", ("experiment=trim_kv",)),
    Ablation("modality_embedding", "input", ("experiment=modality_embedding",)),
    Ablation("text_prior", "input", ("experiment=text_prior",)),
    Ablation("small_budget", "budget", ("experiment=small_budget",)),
    Ablation("large_budget", "budget", ("experiment=large_budget",)),
    Ablation("budget_conditioned", "budget", ("experiment=budget_conditioned",)),
    Ablation("lookahead 8", "while evicting", evict=("policy.db_trim_kv.lookahead=8", "policy.trim_kv.lookahead=8")),
    Ablation("lookahead 64", "while evicting", evict=("policy.db_trim_kv.lookahead=64", "policy.trim_kv.lookahead=64")),
    Ablation("floor of 1 per head", "while evicting", evict=("cache.min_per_head=1",)),
    Ablation("floor of 2 per head", "while evicting", evict=("cache.min_per_head=2",)),
    Ablation("age + 1", "while evicting", evict=("policy.db_trim_kv.age_offset=1", "policy.trim_kv.age_offset=1")),
)


@dataclass
class Found:
    """All that the page is made of: cells and scores by (ablation, policy, budget), sizes by ablation."""

    cells: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    scores: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    seeds: int = len(SEEDS)


def gates_of(ablation: Ablation, work: Path, quick: bool) -> list[Path]:
    """One artefact per seed, trained where missing; the demo's for what differs only while evicting."""
    name = (ablation.name if ablation.train else DEMO).replace(" ", "_")
    steps = [] if quick else [f"trainer.max_steps={STEPS}"]
    seeds = SEEDS[:1] if quick else SEEDS
    return [trained(work, f"{name}_seed{seed}", [*ablation.train, *steps], seed, quick) for seed in seeds]


def evaluate(found: Found, ablation: Ablation, bench: Bench, gates: list[Path], budgets: tuple[str, ...]) -> None:
    """All cells of one row, added to what is there."""
    base = compose("eval", ["gates=null", *ablation.evict])
    bench.base.policy, bench.base.cache = base.policy, base.cache
    folder = ablation.name.replace(" ", "_")
    bench.run(bench.config(TASK, ",".join(map(str, gates)), folder, policies=POLICIES, budgets=budgets))
    rows = [row for row in bench.rows(folder) if row["policy"] in (*POLICIES, "full")]
    order = {name: i for i, name in enumerate(sorted({row["example_id"] for row in rows}))}
    for cell in summarise(rows):
        own = [r for r in rows if (r["policy"], r["budget"]["requested"]) == (cell["policy"], cell["budget"])]
        if cell["policy"] == "full":
            found.full = cell
            continue
        key = (ablation.name, cell["policy"], cell["budget"])
        found.cells[key], found.scores[key] = (
            cell | {"ablation": ablation.name, "group": ablation.group},
            cube(own, order),
        )
    stack = RetentionGates.from_pretrained(gates[0]).stack
    found.parameters[ablation.name] = sum(p.numel() for p in stack.parameters())


def compare(found: Found) -> None:
    """Paired difference of every cell with the demo's, p-values Holm-corrected over the table."""
    keys = [key for key in found.cells if key[0] != DEMO]
    pairs = {key: [found.scores[k].mean(0) for k in (key, (DEMO, *key[1:]))] for key in keys}
    for key, p in zip(keys, holm([paired_p_value(*pairs[key]) for key in keys]), strict=True):
        gap, low, high = paired_difference(*pairs[key])
        found.cells[key] |= {"diff": gap, "diff_low": low, "diff_high": high, "p": p}


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, evaluate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, printed")
    parser.add_argument("--json", type=Path, help="also write cells, verdicts and machine to this file")
    parser.add_argument(
        "--only", nargs="*", help="these rows alone (the demo is always there), printed and not written"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/table_ablations"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    known = [ablation.name for ablation in ABLATIONS]
    if wrong := sorted(set(args.only or []) - set(known)):
        parser.error(f"expected --only among {', '.join(known)}, got {', '.join(wrong)}")
    chosen = [a for a in ABLATIONS if not args.only or a.name in (*args.only, DEMO)]
    found = Found(seeds=1 if args.quick else len(SEEDS))
    bench = Bench((args.work / "quick" if args.quick else args.work) / "eval", args.quick)
    budgets = BUDGETS[1:2] if args.quick else BUDGETS
    for ablation in chosen:
        evaluate(found, ablation, bench, gates_of(ablation, args.work, args.quick), budgets)
    compare(found)
    if args.json:
        told = {"rows": list(found.cells.values()), "verdicts": verdicts(found), "machine": hardware()}
        write_json(args.json, told)
    print("\n".join(table(found, POLICIES, budgets)))
    if args.quick or args.only:
        return
    write_text(args.out / "ablations.md", page(found, POLICIES, budgets))
    write_cells(found, args.out / "ablations.csv")
    print(args.out / "ablations.md")


if __name__ == "__main__":
    main()
