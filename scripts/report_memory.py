"""Does a memory of evicted tokens help: beside gates alone, at equal entries, and at equal bytes?

`python scripts/report_memory.py` writes docs/results/memory.md. Gates are those of `scripts/table_main.py`'s plain
trainings, or `--gates`; memories that need training are trained on them where they are missing. A stopped run goes on
where it was. `--quick` prints the same in miniature; `--json PATH` also writes cells, claims, diagnostics and machine.
"""

import argparse
import glob
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory_page import Cell, Key, claims, page

from retention.attach.capture import capture_attention
from retention.attach.simulate import decide_eviction
from retention.budget import Budget
from retention.config import compose
from retention.data.render import Rendered, Renderer
from retention.evaluation.config import EvalConfig
from retention.evaluation.reactivation import Look, figures, look_after
from retention.evaluation.run import claim, load_gate_sets
from retention.evaluation.runner import Runner
from retention.evaluation.session import Session
from retention.evaluation.statistics import paired_difference, summarise
from retention.evaluation.store import RowStore
from retention.files import write_json, write_text
from retention.gates import RetentionGates
from retention.memory import RetentionMemory
from retention.models import family_of
from retention.models.load import load_configured
from retention.policies import POLICIES
from retention.provenance import hardware
from retention.training.run import run as train

GATES = "outputs/table_main/train/plain_seed*/gates"
MEMORIES = ("retentive", "gated", "paper", "slots", "moment")
RANKED_BY = ("trim_kv", "db_trim_kv")
SPENT = ("memory+", "memory_paid+", "refund+")
TASKS = {"recall": 16, "majority": 32, "needles": 32}
"""Contexts that are evaluated together."""
BUDGETS = ("20%", "10%", "5%", "2.5%", "1.25%")
CONTEXTS = 32
"""Of every task, all their turns."""
LOOKED_AT = 8
"""Contexts of a task that diagnostics read."""
QUICK_TRAIN = ["trainer.max_steps=2", "trainer.val_every=2", "trainer.save_every=2", "data.batch_size=2", "data.val_examples=2", "trainer.val_budgets=[5%]"]  # fmt: skip


@dataclass
class Found:
    """All that the page is made of, keyed (task, policy, budget, memory); the memory of gates alone is `none`."""

    cells: dict[Key, Cell] = field(default_factory=dict)
    scores: dict[Key, np.ndarray] = field(default_factory=dict)
    """[turns, seeds, contexts], contexts and seeds in the same order everywhere."""
    looks: dict[Key, Cell] = field(default_factory=dict)
    """Figures of `retention.evaluation.reactivation`."""
    heads: dict[Key, list[list[float]]] = field(default_factory=dict)
    """Missing mass by layer and query head, gates alone."""
    trained: dict[str, bool] = field(default_factory=dict)

    def difference(self, one: Key, other: Key, turns: slice = slice(None)) -> tuple[float, float, float]:
        """Paired difference in accuracy on some turns, with its interval."""
        return paired_difference(*(self.scores[key][turns].mean(0) for key in (one, other)))


def memory_folders(gates: list[Path], work: Path, memory: str, quick: bool) -> list[Path]:
    """The gates with a memory beside each; trained, or merely written, where they are not there yet."""
    folders = []
    for number, source in enumerate(gates):
        folder = work / "train" / f"{memory}_{number}"
        place = f"resume={folder}" if (folder / "config.json").exists() else f"output_dir={folder}"
        settings = [f"memory={memory}", "trainer=memory", "task=needles", f"memory_training.gates={source}"]
        settings += [f"seed={number}", "logger=csv", place, *(QUICK_TRAIN if quick else [])]
        folders.append(train(compose("train", settings)))
    return folders


class Bench:
    """The model, and the parts of the evaluation that are missing."""

    def __init__(self, work: Path, quick: bool) -> None:
        self.work, self.quick = work, quick
        few = ["examples=2", "batch_size=2"] if quick else [f"examples={CONTEXTS}"]
        self.base = compose("eval", ["gates=null", *few])
        model, processor = load_configured(self.base.model)
        self.renderer = Renderer(processor, family_of(model).visual_ids(model.config))
        self.runner = Runner(model, self.renderer, self.base.model.prompt_style)

    def config(
        self, task: str, memory: str, gates: list[Path], policies: list[str], budgets: tuple[str, ...]
    ) -> EvalConfig:
        """Settings of the arms of one memory on one task."""
        size = self.base.batch_size if self.quick else TASKS[task]
        lists = {"tasks": [task], "policies": policies, "budgets": list(budgets)}
        place = {"gates": ",".join(map(str, gates)), "output_dir": str(self.work / "eval" / memory / task)}
        return replace(self.base, batch_size=size, **lists, **place)

    def rows(self, config: EvalConfig) -> list[Cell]:
        """Answers of all arms; those that are missing are asked for now."""
        folder = Path(config.output_dir)
        claim(folder, config)
        store = RowStore(folder)
        Session(config, self.runner, load_gate_sets(config), store).run()
        return store.rows

    def contexts(self, task: str) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Batches of contexts with their turns, and which columns are evidence of any."""
        made = self.base.task[task]
        count = 2 if self.quick else LOOKED_AT
        for start in range(0, count, 4):
            numbers = range(start, min(start + 4, count))
            examples = [made.example(self.base.seed, "test", i, style=self.runner.style) for i in numbers]
            batch = self.renderer.training_batch(examples)
            marked = self.renderer.render([e.whole() for e in examples])
            yield batch.inputs, evidence_columns(marked, batch.inputs["attention_mask"])


def evidence_columns(rendered: Rendered, mask: torch.Tensor) -> torch.Tensor:
    """Columns of a left-padded batch that answer any turn."""
    found = torch.zeros(mask.shape, dtype=torch.bool)
    for row, turns in enumerate(rendered.evidence):
        padding = int((mask[row] == 0).sum())
        found[row, [padding + p for turn in turns for p in turn or []]] = True
    return found


def answer(
    found: Found, bench: Bench, gates: dict[str, list[Path]], tasks: tuple[str, ...], budgets: tuple[str, ...]
) -> None:
    """Accuracy of all arms of all memories, into `found`."""
    for task in tasks:
        for memory, folders in gates.items():
            prefixes = ("",) if memory == "none" else SPENT
            policies = [f"{prefix}{name}" for name in RANKED_BY for prefix in prefixes]
            rows = bench.rows(bench.config(task, memory, folders, policies, budgets))
            named = {"full", *policies} if memory == "none" else set(policies)
            collect(found, memory, [row for row in rows if row["policy"] in named])


def collect(found: Found, memory: str, rows: list[Cell]) -> None:
    """Summaries and scores of one memory's rows on one task."""
    order = {name: i for i, name in enumerate(sorted({row["example_id"] for row in rows}))}
    grouped: dict[Key, list[Cell]] = {}
    for row in rows:
        grouped.setdefault((row["task"], row["policy"], row["budget"]["requested"], memory), []).append(row)
    for key, own in grouped.items():
        seeds = sorted({row["seed_train"] for row in own}, key=lambda seed: (seed is None, seed))
        scores = np.full((own[0]["n_turns"], len(seeds), len(order)), np.nan)
        for row in own:
            scores[row["turn"], seeds.index(row["seed_train"]), order[row["example_id"]]] = row["score"]
        found.scores[key] = scores
    for row in summarise(rows):
        found.cells[row["task"], row["policy"], row["budget"], memory] = row


@torch.no_grad()
def diagnose(
    found: Found, bench: Bench, gates: dict[str, list[Path]], tasks: tuple[str, ...], budgets: tuple[str, ...]
) -> None:
    """Missing mass, recovered error and reactivation of all memories, from one full-cache pass for each set of gates."""
    model, looks = bench.runner.model, dict[Key, list[Look]]()
    for number, folder in enumerate(gates["none"]):
        alone = RetentionGates.from_pretrained(folder).to(model.device)
        memories: dict[str, RetentionMemory | None] = {"none": None}
        for memory, folders in gates.items():
            if memory != "none":
                memories[memory] = RetentionGates.from_pretrained(folders[number]).to(model.device).memory
        for task in tasks:
            for inputs, evidence in bench.contexts(task):
                with capture_attention(model, alone) as capture:
                    model(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False, logits_to_keep=1)
                for name in RANKED_BY:
                    for budget in budgets:
                        share = Budget.parse(budget).amount
                        eviction = decide_eviction(capture, capture.context(), POLICIES[name](), share)
                        if eviction is None:
                            continue
                        for memory, own in memories.items():
                            seen = look_after(capture, eviction, own, evidence.to(model.device))
                            looks.setdefault((task, name, budget, memory), []).extend(seen)
    for key, seen in looks.items():
        found.looks[key] = figures(seen)
        if key[3] == "none":
            layers, heads = bench.runner.model.config.get_text_config().num_hidden_layers, seen[0].mass.shape[1]
            by_layer = [seen[i::layers] for i in range(layers)]
            found.heads[key] = [[figures(x, [h])["missing_mass"] or 0.0 for h in range(heads)] for x in by_layer]


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, evaluate, look, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a miniature of everything, printed")
    parser.add_argument("--json", type=Path, help="also write cells, claims, diagnostics and machine to this file")
    parser.add_argument(
        "--gates", default=GATES, help="folders of trained gates without a memory, or a pattern of them"
    )
    parser.add_argument("--memories", nargs="+", default=MEMORIES, choices=MEMORIES, help="presets to compare; all")
    parser.add_argument("--work", type=Path, default=Path("outputs/report_memory"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    sources = [Path(x) for part in args.gates.split(",") for x in sorted(glob.glob(part))]
    if not sources:
        raise SystemExit(f"expected trained gates at {args.gates}, found none; run python scripts/table_main.py")
    work, quick = (args.work / "quick" if args.quick else args.work), args.quick
    sources, tasks, budgets = (sources[:1], ("recall",), ("5%",)) if quick else (sources, tuple(TASKS), BUDGETS)
    shown = ("retentive", "paper", "moment") if quick else tuple(args.memories)
    gates = {"none": sources} | {memory: memory_folders(sources, work, memory, quick) for memory in shown}
    found, bench = Found(), Bench(work, quick)
    for memory in shown:
        kept = RetentionGates.from_pretrained(gates[memory][0]).memory
        assert kept is not None
        found.trained[memory] = kept.config.trained
    answer(found, bench, gates, tasks, budgets)
    diagnose(found, bench, gates, tasks, budgets)
    text = page(found, budgets)
    if args.json:
        write_json(args.json, told(found))
    if quick:
        print(text)
        return
    write_text(args.out / "memory.md", text)
    print(text.split("\n## Accuracy")[0], args.out / "memory.md", sep="\n")


def told(found: Found) -> dict[str, Any]:
    """Everything as plain values."""
    looks = [dict(zip(("task", "policy", "budget", "memory"), key, strict=True)) | x for key, x in found.looks.items()]
    heads = [[*key[:3], table] for key, table in found.heads.items()]
    cells = [row | {"memory": key[3]} for key, row in found.cells.items()]
    return {"rows": cells, "claims": claims(found), "diagnostics": looks, "missing_mass": heads, "machine": hardware()}


if __name__ == "__main__":
    main()
