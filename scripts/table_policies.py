"""Every policy of the registry on the whole suite of the embedded model: who keeps what, and is it worth it?

`python scripts/table_policies.py` writes docs/results/policies.md, policies.csv and figures. Gates come from
`scripts/table_main.py`'s trainings and, for policies that rank by gates of another objective, from runs beside them;
what is missing is trained first. A stopped run goes on where it was. `--quick` prints the same in miniature;
`--json PATH` also writes all cells, claims and the machine.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import QUICK as QUICK_PLAN
from bench_decode import Plan, curve
from decode_caches import Bench as DecodeBench
from policies_page import claims, page, write_cells
from table_main import QUICK_TRAIN, SEEDS, TRAININGS

from retention.config import compose, presets
from retention.data.render import Renderer
from retention.evaluation import plots
from retention.evaluation.arms import make_arm, needs_gates
from retention.evaluation.config import EvalConfig
from retention.evaluation.protocol import Protocol
from retention.evaluation.run import claim, load_gate_sets
from retention.evaluation.runner import Runner
from retention.evaluation.session import Session
from retention.evaluation.statistics import holm, paired_difference, paired_p_value, summarise
from retention.evaluation.store import RowStore
from retention.files import write_json, write_text
from retention.models import family_of
from retention.models.family import model_shape
from retention.models.load import load_configured
from retention.policies import POLICIES, Policy
from retention.provenance import hardware
from retention.training.run import run as train

SUITE = {  # task: the training whose gates it takes, contexts evaluated together
    "ask_subset": ("ask_subset", 32),
    "needles": ("plain", 32),
    "recall": ("plain", 16),
    "recall_text": ("plain", 16),
    "majority": ("plain", 32),
    "text_heavy": ("plain", 32),
    "text_heavy_facts": ("plain", 32),
    "needles_1440": ("plain", 8),
    "diffuse_count": ("plain", 32),
}
UNASKED = ("needles_1440",)
"""Tasks on which no question is read before the eviction: whole prompts are dear there."""
QUICK_SUITE = ("ask_subset", "recall", "text_heavy", "diffuse_count")
COMPARED = "plain"
"""The training that other objectives than distillation are trained on as well."""
TASK_OF = {"ask_subset": "ask_subset", "plain": "needles"}
BUDGETS = ("50%", "20%", "10%", "5%", "2.5%")
PROTOCOLS = ("agnostic", "aware")
CONTEXTS = 32
"""Of every task, all their turns."""
DRAWN = ("ask_subset", "needles", "recall", "majority", "text_heavy")
LINES = 5
QUICK = ["examples=2", "batch_size=2", "quota_examples=2"]
Cell = dict[str, Any]
Key = tuple[str, str, str, str]


@dataclass
class Found:
    """All that the page is made of, keyed (task, protocol, policy, budget)."""

    cells: dict[Key, Cell] = field(default_factory=dict)
    scores: dict[Key, np.ndarray] = field(default_factory=dict)
    """[turns, seeds, contexts], contexts in the same order for every policy."""
    refused: dict[Key, str] = field(default_factory=dict)
    not_learnt: dict[str, Cell] = field(default_factory=dict)
    summary: list[Cell] = field(default_factory=list)
    speed: Cell = field(default_factory=dict)
    """Decoding with a fifth of a long context kept."""

    def difference(self, one: Key, other: Key, turns: slice = slice(None)) -> tuple[float, float, float]:
        """Paired difference in accuracy on some turns, with its interval."""
        return paired_difference(*(self.scores[key][turns].mean(0) for key in (one, other)))

    def best_heuristic(self, task: str, protocol: str, budget: str, turns: slice = slice(None)) -> str | None:
        """The most accurate policy without gates on some turns."""
        named = {
            key[2]: float(x[turns].mean())
            for key, x in self.scores.items()
            if key[:2] == (task, protocol)
            and key[3] == budget
            and key[2] != "full"
            and not (self.cells[key]["learned"] or self.cells[key]["reference"])
        }
        return max(named, key=lambda name: named[name]) if named else None


def gate_folders(work: Path, quick: bool, others: bool) -> dict[tuple[str, str], str]:
    """Gates by training and objective, as the evaluation wants them named; trained here where some are missing."""
    found = {}
    for objective in dict.fromkeys(p.gates_of for p in POLICIES.values() if p.gates_of):
        for training in TRAININGS:
            if objective != "distillation" and (quick or not others or training != COMPARED):
                continue
            name, overrides = gates_for(training, objective)
            folders = [
                trained(work, f"{name}_seed{seed}", overrides, seed, quick) for seed in (SEEDS[:1] if quick else SEEDS)
            ]
            found[training, objective] = ",".join(map(str, folders))
    return found


def gates_for(training: str, preset: str) -> tuple[str, list[str]]:
    """Name and overrides of the training that makes gates by an objective's preset, on the task of a training."""
    if preset == "distillation":
        return training, TRAININGS[training]
    short = f"{preset}_short_context"
    overrides = [f"objective={short if short in presets('objective') else preset}", f"task={TASK_OF[training]}"]
    return f"{training}_{preset}", [*overrides, *(["gate=per_head"] if preset == "duo_attention" else [])]


def trained(work: Path, name: str, overrides: list[str], seed: int, quick: bool) -> Path:
    """Gates of one run: those that are there, else trained or gone on with, in miniature for `quick`."""
    if (work / "train" / name / "gates").exists():
        return work / "train" / name / "gates"
    folder = (work / "quick" if quick else work) / "train" / name
    if (folder / "gates").exists():
        return folder / "gates"
    place = f"resume={folder}" if (folder / "config.json").exists() else f"output_dir={folder}"
    return train(compose("train", [*overrides, f"seed={seed}", "logger=csv", place, *(QUICK_TRAIN if quick else [])]))


class Bench:
    """The model with the composed settings; runs what is missing of any part of the suite."""

    def __init__(self, out: Path, quick: bool) -> None:
        self.out, self.quick, self.base = out, quick, compose("eval", ["gates=null", *(QUICK if quick else [])])
        model, processor = load_configured(self.base.model)
        renderer = Renderer(processor, family_of(model).visual_ids(model.config))
        self.runner = Runner(model, renderer, self.base.model.prompt_style)

    def config(self, task: str, gates: str | None, folder: str | None = None, **lists: Iterable[str]) -> EvalConfig:
        """Settings of one evaluation: policies, budgets and protocols of one task."""
        size, count = (self.base.batch_size, self.base.examples) if self.quick else (SUITE[task][1], CONTEXTS)
        place = {"output_dir": str(self.out / (folder or task)), "batch_size": size, "examples": count, "gates": gates}
        return replace(self.base, tasks=[task], **place, **{name: list(values) for name, values in lists.items()})

    def run(self, config: EvalConfig) -> None:
        """Add what is missing to the rows of a task; nothing is drawn or summarised yet."""
        claim(Path(config.output_dir), config)
        Session(config, self.runner, load_gate_sets(config), RowStore(Path(config.output_dir))).run()

    def rows(self, folder: str) -> list[Cell]:
        """All answers in a folder, the task's name where nothing else was chosen."""
        return RowStore(self.out / folder).rows

    def refusals(self, config: EvalConfig) -> Iterator[tuple[Key, str]]:
        """What cannot be decided, with the policy's own words: every cell is tried on one question of one context."""
        gates, task = load_gate_sets(config)[0].gates, config.task[config.tasks[0]]
        batch = self.runner.renderer.render([task.example(config.seed, "val", 0, style=self.runner.style, n_turns=1)])
        shape = model_shape(self.runner.model)
        even = torch.ones(shape.num_layers, shape.num_kv_heads)  # whatever the gates' shares, for a trial
        for protocol in config.protocols:
            for name in config.policies:
                arms = [make_arm(config, name, budget, Protocol.parse(protocol), even) for budget in config.budgets]
                if self._refusal(batch, arms, gates):
                    for arm in arms:
                        if reason := self._refusal(batch, [arm], gates):
                            yield (config.tasks[0], protocol, name, arm.budget), reason

    def _refusal(self, batch: Any, arms: list, gates: Any) -> str | None:
        try:
            list(self.runner.run(batch, arms, gates))
        except (ValueError, NotImplementedError) as error:
            return str(error)
        except Exception as error:  # one broken policy must not cost the others their night
            return f"failed with {type(error).__name__}: {error}"
        return None


def evaluate_task(found: Found, bench: Bench, task: str, gates: dict[str, str]) -> None:
    """All cells of one task that can be decided, into `found`; nothing but the full cache where it has not learnt it."""
    table, asking = bench.base.policy, PROTOCOLS[:1] if task in UNASKED else PROTOCOLS
    names = [name for name, policy in table.items() if policy.evicts]
    budgets = BUDGETS[3:4] if bench.quick else BUDGETS
    bench.run(bench.config(task, None, policies=["random"], budgets=budgets[-1:], protocols=PROTOCOLS[:1]))
    full = next(r for r in summarise(bench.rows(task)) if r["policy"] == "full")
    if full["accuracy"] < (1 + full["chance"]) / 2 and not (bench.quick and task != "diffuse_count"):
        found.not_learnt[task] = full
        return
    asked = {
        name: table[name].gates_of or ("distillation" if needs_gates(bench.base, name) else None) for name in names
    }
    for objective in dict.fromkeys(asked.values()):
        own = [name for name in names if asked[name] == objective]
        chosen = None if objective is None else gates.get(objective)
        if objective is not None and chosen is None:
            cells = [(task, p, name, b) for p in asking for name in own for b in budgets]
            found.refused |= dict.fromkeys(cells, f"no gates trained with objective {objective} on this task")
            continue
        found.refused |= dict(
            bench.refusals(bench.config(task, chosen, policies=own, budgets=budgets, protocols=asking))
        )
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for name in own:
            allowed = {p: tuple(b for b in budgets if (task, p, name, b) not in found.refused) for p in asking}
            for those in dict.fromkeys(x for x in allowed.values() if x):
                groups.setdefault((tuple(p for p in asking if allowed[p] == those), those), []).append(name)
        for (protocols, those), policies in groups.items():
            bench.run(bench.config(task, chosen, policies=policies, budgets=those, protocols=protocols))
    collect(found, [row for row in bench.rows(task) if row["policy"] in (*names, "full")], table)


def collect(found: Found, rows: list[Cell], table: Mapping[str, Policy]) -> None:
    """Summaries and scores of one task's rows, with paired comparisons corrected over its policies and budgets."""
    grouped: dict[Key, list[Cell]] = {}
    for row in rows:
        key = (row["task"], row["protocol"].split("/")[0], row["policy"], row["budget"]["requested"])
        grouped.setdefault(key, []).append(row)
    order = {name: i for i, name in enumerate(sorted({row["example_id"] for row in rows}))}
    found.scores |= {key: cube(own, order) for key, own in grouped.items()}
    for row in summarise(rows):
        key = (row["task"], row["protocol"].split("/")[0], row["policy"], row["budget"])
        found.cells[key] = row | {
            "learned": bool(row["seed_accuracy"]),
            "reference": table[row["policy"]].needs_evidence,
        }
        found.summary.append(row)
    for task, protocol in dict.fromkeys(key[:2] for key in grouped):
        keys = [key for key in grouped if key[:2] == (task, protocol) and key[2] != "full"]
        full = (task, protocol, "full", "100%")
        best = {key[3]: (task, protocol, _best(found, key), key[3]) for key in keys}
        _compare(found, keys, dict.fromkeys(keys, full), "full")
        _compare(found, keys, {key: best[key[3]] for key in keys}, "best")


def cube(rows: list[Cell], order: dict[str, int]) -> np.ndarray:
    """Scores of one cell as [turns, seeds, contexts]; NaN is missing."""
    seeds = sorted({row["seed_train"] for row in rows}, key=lambda seed: (seed is None, seed))
    scores = np.full((rows[0]["n_turns"], len(seeds), len(order)), np.nan)
    for row in rows:
        scores[row["turn"], seeds.index(row["seed_train"]), order[row["example_id"]]] = row["score"]
    return scores


def _best(found: Found, key: Key) -> str:
    task, protocol, policy, budget = key
    return found.best_heuristic(task, protocol, budget) or policy


def _compare(found: Found, keys: list[Key], with_: dict[Key, Key], name: str) -> None:
    """Paired difference and Holm's p of every cell against its reference."""
    raw = [paired_p_value(*(found.scores[k].mean(0) for k in (key, with_[key]))) for key in keys]
    for key, p in zip(keys, holm(raw), strict=True):
        gap, low, high = found.difference(key, with_[key])
        found.cells[key] |= {f"diff_{name}": gap, f"diff_{name}_low": low, f"diff_{name}_high": high, f"p_{name}": p}
        found.cells[key][f"reference_{name}"] = with_[key][2]


def decode_speed(quick: bool) -> Cell:
    """Decoding with 20% of a context kept in one pool, by turns with the fastest full cache (random Llama and contents)."""
    plan = replace(QUICK_PLAN if quick else Plan(), curve_contexts=(512 if quick else 8192,), curve_budgets=("20%",))
    rows = curve(DecodeBench(plan.decoder, torch.device("cpu"), 14.0 * 2**30), plan)
    return next(row for row in rows if row.get("budget") == "20%")


def draw(found: Found, out: Path) -> list[str]:
    """Curves of the learned and the best other policies per protocol, and accuracy by turn; names of the pictures."""
    learned = {key[2] for key, cell in found.cells.items() if cell["learned"]}
    others = {key[2] for key, cell in found.cells.items() if not cell["reference"]} - learned - {"full"}

    def level(name: str, protocol: str) -> float:
        own = [c["accuracy"] for k, c in found.cells.items() if k[1:3] == (protocol, name) and k[0] in DRAWN]
        return float(np.mean(own or [0.0]))

    drawn = []
    for protocol in PROTOCOLS:
        shown = learned | set(sorted(others, key=lambda n: -level(n, protocol))[:LINES]) | {"random", "full"}
        rows = [
            r
            for r in found.summary
            if r["policy"] in shown and r["task"] in DRAWN and r["protocol"].startswith(protocol)
        ]
        drawn.append(plots.accuracy_curves(rows, out / f"policies_{protocol}.png").name)
    shown = [*learned, *sorted(others, key=lambda n: -level(n, "aware"))[:LINES]]
    rows = [r for r in found.summary if r["task"] == "needles" and r["protocol"].startswith("aware")]
    drawn.append(plots.deferred_curve(rows, out / "policies_by_turn.png", "needles", budget="5%", policies=shown).name)
    for file in (*out.glob("policies_*.csv"), *out.glob("policies_*.svg")):
        file.unlink()  # policies.csv has all of it, and pages show the PNG
    return drawn


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, evaluate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, printed")
    parser.add_argument("--json", type=Path, help="also write cells, claims and machine to this file")
    parser.add_argument(
        "--only-distilled", action="store_true", help="train no gates of other objectives than distillation"
    )
    parser.add_argument("--gates", type=Path, default=Path("outputs/table_main"), help="where table_main.py trained")
    parser.add_argument("--work", type=Path, default=Path("outputs/table_policies"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    work, found = args.work / "quick" if args.quick else args.work, Found()
    gates = gate_folders(args.gates, args.quick, not args.only_distilled)
    bench = Bench(work / "eval", args.quick)
    for task in QUICK_SUITE if args.quick else SUITE:
        training, _ = SUITE[task]
        own = {objective: folders for (of, objective), folders in gates.items() if of == training}
        evaluate_task(found, bench, task, own)
    found.speed = decode_speed(args.quick)
    pictures = [] if args.quick else draw(found, args.out)
    text = page(found, budgets=BUDGETS, pictures=pictures)
    if args.json:
        told = {"rows": list(found.cells.values()), "claims": claims(found), "machine": hardware()}
        write_json(args.json, told | {"not_applicable": [[*key, why] for key, why in found.refused.items()]})
    if args.quick:
        print(text)
        return
    write_text(args.out / "policies.md", text)
    write_cells(found, args.out / "policies.csv")
    print(re.sub(r"\n## Tables.*", "", text, flags=re.DOTALL), args.out / "policies.md", sep="\n")


if __name__ == "__main__":
    main()
