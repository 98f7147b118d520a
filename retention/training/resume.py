"""Which checkpoint a run goes on from, and whether its settings are still the same."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retention.files import write_json
from retention.training.config import TrainConfig

_FREE = ("resume", "output_dir", "logger")
"""Settings that may differ between a run and its continuation."""
_WHERE = ("strategy", "recompute_activations")
"""Of trainer: so may these."""
_PARTS = ("devices", "num_nodes", "accumulate")
"""Of trainer: how a step's rows are cut into parts, which may differ where rows are counted and not planned by parts."""


def settings(config: TrainConfig) -> dict[str, Any]:
    """Plain values of a config, with the names of its polymorphic parts."""
    values = asdict(config)
    for part in ("gate", "objective", "task"):
        values[part]["_type"] = type(getattr(config, part)).__name__
    return values


def claim(folder: Path, config: TrainConfig) -> None:
    """Make the run's folder and record its settings; refuse a folder that belongs to other settings.

    Raises:
        ValueError: naming the first setting that differs, or a run that would be overwritten.
    """
    file = folder / "config.json"
    wanted = settings(config)
    if file.exists():
        before, now = _told_apart(json.loads(file.read_text())), _told_apart(json.loads(json.dumps(wanted)))
        for key in wanted:
            if key not in _FREE and now[key] != before.get(key):
                raise ValueError(
                    f"{folder} belongs to a run with {key} = {before.get(key)}, this one has {now[key]}; resume with the same "
                    "settings or choose another output_dir"
                )
        if config.resume is None:
            raise ValueError(
                f"{folder} holds a run already; add resume={folder} to go on with it, or choose another output_dir"
            )
        return
    if config.resume is not None:
        raise ValueError(f"expected a run to resume in {folder}, found none; check the path or drop resume")
    write_json(file, wanted)


def _told_apart(values: dict[str, Any]) -> dict[str, Any]:
    """What of a run's settings a continuation may not change; the rows of a step in place of how they are cut."""
    trainer = {k: v for k, v in values["trainer"].items() if k not in _WHERE}
    model, data = {k: v for k, v in values["model"].items() if k != "device"}, dict(values["data"])
    if not data["sources"]:
        data["rows_per_step"] = data.pop("batch_size") * math.prod(trainer.pop(name, 1) for name in _PARTS)
    return values | {"model": model, "trainer": trainer, "data": data}


def newest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The checkpoint of the largest step, and that step; (None, 0) where the run was killed before its first."""
    steps = {}
    for file in (folder / "checkpoints").glob("*.ckpt"):
        match = re.fullmatch(r"step=(\d+)\.ckpt", file.name)
        if match:
            steps[int(match.group(1))] = file
    return (steps[max(steps)], max(steps)) if steps else (None, 0)
