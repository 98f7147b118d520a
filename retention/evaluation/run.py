"""A whole evaluation: every task x protocol x policy x budget in one run, then everything it leaves."""

import glob
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from retention.data.render import Renderer
from retention.evaluation.arms import needs_gates
from retention.evaluation.checks import over_budget, questions_hash
from retention.evaluation.compare import rebuild
from retention.evaluation.config import MEMORY, QUOTA, EvalConfig, base_name, prefix_of
from retention.evaluation.diagnostics import Diagnostics
from retention.evaluation.equality import FLOOR
from retention.evaluation.protocol import Protocol
from retention.evaluation.ranks import agreed, own_device, rank, wait
from retention.evaluation.results import Result, Source, write_results
from retention.evaluation.runner import GateSet, Runner
from retention.evaluation.session import Session
from retention.evaluation.store import RowStore
from retention.files import write_json
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.family import decoder_device
from retention.models.load import load_configured
from retention.provenance import hardware, package_versions, without_paths

_GROWING = ("tasks", "policies", "budgets", "protocols", "output_dir", "gates", "experiment", "batch_size", "report")
CAVEATS = [
    "The gates saw the question distribution in training, the heuristics did not.",
    "Questions and answers are held on top of the context's budget, for every policy alike.",
    "agnostic: the context is evicted before any question is read; aware: the first question is read before the eviction "
    "and asked again after it.",
    "quota+X keeps X's scores but takes the gates' own mean share of every layer and head, measured on validation contexts.",
    "The embedded model is tiny: these results are about mechanisms and correctness, not about large models.",
]


def run(config: EvalConfig) -> Result:
    """Evaluate as configured; a stopped run with the same `output_dir` goes on where it was.

    `random` is in every run, as the full cache is. Of several processes (`torchrun`) each takes a part of the batches, and
    the first reports. With `report` nothing is run: see `rebuild`.

    Raises:
        ValueError: when gates are needed and missing, or `output_dir` holds results of other settings.
    """
    if config.report:
        return rebuild([Path(folder) for folder in config.report], Path(config.output_dir))
    started = time.time()
    config = replace(
        config, policies=list(dict.fromkeys([*config.policies, FLOOR])), output_dir=agreed(config.output_dir)
    )
    folder = Path(config.output_dir)
    if rank() == 0:
        claim(folder, config)
    wait()
    model, processor = load_configured(own_device(config.model))
    sets = load_gate_sets(config)
    for gate_set in sets:
        if gate_set.gates is not None:
            gate_set.gates.to(decoder_device(model)).check(model)
    renderer = Renderer(processor, family_of(model).visual_ids(model.config))
    runner = Runner(model, renderer, config.model.prompt_style, config.teacher)
    session = Session(config, runner, sets, RowStore(folder, rank()), Diagnostics(folder, model, renderer))
    session.run()
    wait()
    if rank() != 0:
        return Result("", [], [])
    session.store.gather()
    return _write(folder, config, session, started)


def load_gate_sets(config: EvalConfig) -> list[GateSet]:
    """The artefacts that `gates` names: a folder, a hub id, a glob pattern or several joined by commas."""
    wanted = any(needs_gates(config, name) for name in config.policies)
    if config.gates is None or not wanted:
        if wanted:
            listed = ", ".join(name for name in config.policies if needs_gates(config, name))
            raise ValueError(
                f"the policies {listed} need trained gates, got gates=null; train some with python train.py"
            )
        return [GateSet(None)]
    names = [found for part in config.gates.split(",") for found in (sorted(glob.glob(part)) or [part])]
    loaded = [RetentionGates.from_pretrained(name) for name in names]
    for name in config.policies:
        wanted_of = None if name.startswith(QUOTA) else config.policy[base_name(name)].gates_of
        if prefix_of(name) in MEMORY and any(gates.memory is None for gates in loaded):
            raise ValueError(
                f"{name} needs gates with a memory and these have none; train one (python train.py memory=retentive)"
            )
        for gates in loaded:
            if wanted_of is not None:
                gates.check_objective(wanted_of, name)
    seeds = [gates.training_record.get("seed", i) for i, gates in enumerate(loaded)]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"expected gate sets of different training seeds, got {seeds} from {config.gates!r}")
    return [GateSet(gates, seed) for gates, seed in zip(loaded, seeds, strict=True)]


def claim(folder: Path, config: EvalConfig) -> None:
    """Make the output folder and record its settings; refuse one that belongs to other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    settings = json.loads(json.dumps(asdict(config)))
    if file.exists():
        other = next(_differences(json.loads(file.read_text()), settings), None)
        if other is not None:
            name, was, now = other
            raise ValueError(
                f"{folder} holds results with {name} = {was}, this run has {now}; choose another output_dir"
            )
    write_json(file, settings)


def _differences(before: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of settings that differ, with both values; presets that only one side knows changed nothing."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if before != now:
            yield ".".join(path), before, now
        return
    for key in dict.fromkeys([*before, *now]):
        growing = (
            key in _GROWING if not path else path in (("task",), ("policy",)) and not (key in before and key in now)
        )
        if not growing:
            yield from _differences(before.get(key), now.get(key), (*path, key))


def _write(folder: Path, config: EvalConfig, session: Session, started: float) -> Result:
    """Manifest, then everything that is made from rows, manifest and diagnostics."""
    wanted = {(t, str(Protocol.parse(p))) for t in config.tasks for p in config.protocols}
    rows = [row for row in session.store.rows if (row["task"], row["protocol"]) in wanted]
    manifest = _manifest(config, session, started)
    write_json(folder / "manifest.json", manifest)
    result = write_results(folder, rows, {folder.name: manifest}, [Source(folder)])
    result.files += [folder / "examples.jsonl", folder / "manifest.json"]
    return result


def _manifest(config: EvalConfig, session: Session, started: float) -> dict[str, Any]:
    """Everything a stranger needs to judge and repeat the run; no host, user or absolute path."""
    settings = asdict(config)
    for task in settings["task"].values():
        task.get("judge", {}).update(base_url=None)  # names a host
    drawn = config.seed, config.split, config.examples
    cards = [s.gates.card_config() | {"versions": None} for s in session.sets if s.gates is not None]
    told: dict[str, Any] = {
        "run": Path(config.output_dir).name,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": settings,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 1),
        "versions": package_versions(),
        "hardware": hardware(),
        "dtype": str(session.runner.model.dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": "sdpa",
        "cache": "retention.EvictingCache",
        "base": {
            "name": config.model.name,
            **{k: cards[0]["base"][k] for k in ("config_hash", "weight_hash") if cards},
        },
        "gates": cards,
        "tasks": {name: config.task[name].provenance(*drawn) for name in config.tasks},
        "questions_sha256": questions_hash(session.store.rows),
        "over_budget": over_budget(session.store.rows),
        "rows": len(session.store.rows),
        "rows_reused": session.store.reused,
        "caveats": CAVEATS,
    }
    return without_paths(told)
