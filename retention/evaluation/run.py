"""A whole evaluation: every task x protocol x policy x budget in one run, then summary, pictures and report."""

import glob
import json
import logging
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from retention.data.render import Rendered, Renderer
from retention.evaluation import plots, report
from retention.evaluation.arms import Arm, full_arm, make_arm, mean_counts, needs_gates
from retention.evaluation.config import QUOTA, EvalConfig
from retention.evaluation.diagnostics import patch_lives, survival
from retention.evaluation.protocol import Protocol
from retention.evaluation.runner import GateSet, Runner
from retention.evaluation.statistics import summarise
from retention.evaluation.store import RowStore
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.load import load_configured
from retention.provenance import hardware, package_versions

log = logging.getLogger(__name__)
_GROWING = ("tasks", "policies", "budgets", "protocols", "output_dir", "gates", "experiment", "batch_size")
CAVEATS = [
    "The gates saw the question distribution in training, the heuristics did not.",
    "Questions and answers are held on top of the context's budget, for every policy alike.",
    "agnostic: the context is evicted before any question is read; aware: the first question is read before the eviction "
    "and asked again after it.",
    "quota+X keeps X's scores but takes the gates' own mean share of every layer and head, measured on validation contexts.",
    "The embedded model is tiny: these results are about mechanisms and correctness, not about large models.",
]


@dataclass
class Result:
    """What a run leaves: the table as text, the summary, and the files it wrote."""

    table: str
    summary: list[dict[str, Any]]
    files: list[Path]


def run(config: EvalConfig) -> Result:
    """Evaluate as configured; a stopped run with the same `output_dir` goes on where it was.

    Raises:
        ValueError: when gates are needed and missing, or `output_dir` holds results of other settings.
    """
    started = time.time()
    folder = Path(config.output_dir)
    _claim(folder, config)
    model, processor = load_configured(config.model)
    sets = load_gate_sets(config)
    for gate_set in sets:
        if gate_set.gates is not None:
            gate_set.gates.to(model.device).check(model)
    renderer = Renderer(processor, family_of(model).visual_ids(model.config))
    session = Session(
        config, Runner(model, renderer, config.model.prompt_style), sets, RowStore(folder / "examples.jsonl")
    )
    session.run()
    return _write(folder, config, session, started)


def load_gate_sets(config: EvalConfig) -> list[GateSet]:
    """The artefacts that `gates` names: a folder, a hub id, a glob pattern or several joined by commas."""
    wanted = any(needs_gates(config, name) for name in config.policies)
    if config.gates is None or not wanted:
        if wanted:
            names = ", ".join(name for name in config.policies if needs_gates(config, name))
            raise ValueError(
                f"the policies {names} need trained gates, got gates=null; train some with python train.py"
            )
        return [GateSet(None)]
    names = [found for part in config.gates.split(",") for found in (sorted(glob.glob(part)) or [part])]
    loaded = [RetentionGates.from_pretrained(name) for name in names]
    seeds = [gates.training_record.get("seed", i) for i, gates in enumerate(loaded)]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"expected gate sets of different training seeds, got {seeds} from {config.gates!r}")
    return [GateSet(gates, seed) for gates, seed in zip(loaded, seeds, strict=True)]


def _claim(folder: Path, config: EvalConfig) -> None:
    """Make the output folder and record its settings; refuse one that belongs to other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    settings = json.loads(json.dumps(asdict(config)))
    if file.exists():
        before = json.loads(file.read_text())
        for key, value in settings.items():
            if key not in _GROWING and before.get(key) != value:
                raise ValueError(
                    f"{folder} holds results with {key} = {before.get(key)}, this run has {value}; choose another output_dir"
                )
    write_json(file, settings)


class Session:
    """One run's loop over tasks, gate sets, protocols and batches, and what pictures need of it."""

    def __init__(self, config: EvalConfig, runner: Runner, sets: list[GateSet], store: RowStore) -> None:
        self.config, self.runner, self.sets, self.store = config, runner, sets, store
        self.survival: dict[str, np.ndarray] = {}
        self.patches: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.picture_budget = min(config.budgets, key=lambda b: abs(_amount(b) - 0.05))

    def run(self) -> None:
        """Everything that is not done yet, with a progress bar."""
        c = self.config
        batches = -(-c.examples // c.batch_size)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as bar:
            work = bar.add_task("evaluate", total=len(c.tasks) * len(self.sets) * len(c.protocols) * batches)
            for task in c.tasks:
                for number, gate_set in enumerate(self.sets):
                    quotas = self._quotas(task, gate_set)
                    for protocol in map(Protocol.parse, c.protocols):
                        arms = self._arms(protocol, quotas, first=number == 0)
                        bar.update(work, description=f"{task} {protocol.question} seed {gate_set.seed}")
                        for batch in self.runner.batches(c.task[task], c.split, c.seed, c.examples, c.batch_size):
                            self._batch(task, batch, arms, protocol, gate_set)
                            bar.advance(work)

    def _arms(self, protocol: Protocol, quotas: dict[str, Any], *, first: bool) -> list[Arm]:
        """Arms of one gate set; what does not depend on gates runs with the first set only."""
        names = [
            n for n in dict.fromkeys(self.config.policies) if n != "full" and (first or needs_gates(self.config, n))
        ]
        arms = [make_arm(self.config, n, b, protocol, quotas.get(b)) for n in names for b in self.config.budgets]
        return [full_arm(self.config, protocol), *arms] if first else arms

    def _quotas(self, task: str, gate_set: GateSet) -> dict[str, Any]:
        """Mean kept entries per layer and head of the gates under the global pool, on validation contexts, per budget."""
        c = self.config
        if gate_set.gates is None or not any(n.startswith(QUOTA) for n in c.policies):
            return {}
        protocol = Protocol()
        arms = [make_arm(c, "db_trim_kv", budget, protocol, None) for budget in c.budgets]
        task_object = c.task[task]
        counts: dict[str, Any] = {}
        batches = list(self.runner.batches(replace(task_object), "val", c.seed, c.quota_examples, c.quota_examples))
        for arm, cache, _ in self.runner.run(batches[0], arms, protocol, gate_set.gates):
            counts[arm.budget] = mean_counts(cache.kept())
        return counts

    def _batch(self, task: str, batch: Rendered, arms: list[Arm], protocol: Protocol, gate_set: GateSet) -> None:
        ids = [example.id for example in batch.examples]
        missing = []
        for arm in arms:
            seed = gate_set.seed if arm.needs_gates else None
            if not self.store.has((task, arm.name, str(protocol), arm.budget, seed), ids) or self._pictured(
                arm, protocol
            ):
                missing.append(arm)
        if not missing:
            return
        for arm, cache, rows in self.runner.run(batch, missing, protocol, gate_set.gates):
            self._look(arm, cache, protocol)
            seed = gate_set.seed if arm.needs_gates else None
            named = [
                {"task": task, "split": self.config.split, "seed_data": self.config.seed, "seed_train": seed, **row}
                for row in rows
            ]
            if not self.store.has((task, arm.name, str(protocol), arm.budget, seed), ids):
                self.store.add(named)
        if self.patches is None and gate_set.gates is not None:
            self._look_at_patches(batch, gate_set.gates)

    def _pictured(self, arm: Arm, protocol: Protocol) -> bool:
        """Whether a picture still needs this arm's cache (also on a run that only adds rows)."""
        first = str(protocol) == str(Protocol.parse(self.config.protocols[0]))
        return first and arm.budget == self.picture_budget and f"{arm.name} at {arm.budget}" not in self.survival

    def _look(self, arm: Arm, cache: Any, protocol: Protocol) -> None:
        if self._pictured(arm, protocol):
            self.survival[f"{arm.name} at {arm.budget}"] = survival(cache)

    def _look_at_patches(self, batch: Rendered, gates: RetentionGates) -> None:
        from retention.attach.hard import evicting
        from retention.policies import POLICIES
        from retention.tasks.answering import prefill

        with evicting(self.runner.model, POLICIES["full"](), gates=gates, extra_collectors=("gate",)) as cache:
            prefill(self.runner.model, cache, batch)
        self.patches = patch_lives(cache, batch)


def _amount(budget: str) -> float:
    return float(budget.rstrip("%")) / 100 if budget.endswith("%") else 1.0


def _write(folder: Path, config: EvalConfig, session: Session, started: float) -> Result:
    """Summary, manifest, pictures, report."""
    wanted = {(t, str(Protocol.parse(p))) for t in config.tasks for p in config.protocols}
    rows = [row for row in session.store.rows if (row["task"], row["protocol"]) in wanted]
    summary = summarise(rows)
    manifest = _manifest(config, session, started)
    write_json(folder / "summary.json", {"rows": summary})
    write_json(folder / "manifest.json", manifest)
    pictures = [plots.accuracy_curves(summary, folder / "curves.png")]
    if session.survival:
        pictures.append(plots.survival_heatmap(session.survival, folder / "survival.png"))
    if session.patches is not None:
        images, life, evidence = session.patches
        pictures.append(
            plots.patch_strip(
                images, life, folder / "patches.png", label="half-life of a patch (tokens)", evidence=evidence
            )
        )
    if any(row["accuracy_later_turns"] is not None for row in summary):
        pictures.append(plots.deferred_curve(summary, folder / "deferred.png", config.tasks[0]))
    title = f"retention: {', '.join(config.tasks)}"
    page = report.write_report(
        folder, summary=summary, manifest=manifest, title=title, examples=_sample_turns(rows, config)
    )
    _atomic(folder / "table.md", report.table_markdown(summary))
    files = [
        folder / "summary.json",
        folder / "examples.jsonl",
        folder / "manifest.json",
        folder / "table.md",
        *pictures,
        page,
    ]
    return Result(report.table_text(summary), summary, files)


def _sample_turns(rows: list[dict[str, Any]], config: EvalConfig) -> list[dict[str, Any]]:
    """A few answers with what every policy said, at the picture budget, first protocol and seed."""
    protocol, chosen = str(Protocol.parse(config.protocols[0])), {}
    budget = min(config.budgets, key=lambda b: abs(_amount(b) - 0.05))
    for row in rows:
        if (
            row["task"] == config.tasks[0]
            and row["protocol"] == protocol
            and row["budget"]["requested"] in (budget, "100%")
        ):
            turn = chosen.setdefault(
                (row["example_id"], row["turn"]),
                {
                    "task": row["task"],
                    "example_id": row["example_id"],
                    "turn": row["turn"],
                    "question": row["question"],
                    "answer": row["answer"],
                    "predictions": {},
                    "scores": {},
                },
            )
            turn["predictions"].setdefault(row["policy"], row["prediction"])
            turn["scores"].setdefault(row["policy"], row["score"])
    return list(chosen.values())[:12]


def _manifest(config: EvalConfig, session: Session, started: float) -> dict[str, Any]:
    """Everything a stranger needs to judge and repeat the run; no host, user or absolute path."""
    settings = asdict(config)
    settings["gates"] = None if config.gates is None else ",".join(os.path.relpath(g) for g in config.gates.split(","))
    settings["output_dir"] = os.path.relpath(config.output_dir)
    cards = [s.gates.card_config() | {"versions": None} for s in session.sets if s.gates is not None]
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": settings,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "versions": package_versions(),
        "hardware": hardware(),
        "attention": "sdpa",
        "cache": "retention.EvictingCache",
        "base": {
            "name": config.model.name,
            **{k: cards[0]["base"][k] for k in ("config_hash", "weight_hash") if cards},
        },
        "gates": cards,
        "rows": len(session.store.rows),
        "rows_reused": session.store.reused,
        "caveats": CAVEATS,
    }


def _atomic(file: Path, text: str) -> None:
    fresh = file.with_name(f".{file.name}.tmp")
    fresh.write_text(text)
    os.replace(fresh, file)


def write_json(file: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    _atomic(file, json.dumps(value, indent=2, default=str) + "\n")
