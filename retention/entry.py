"""The commands `retention-train` and `retention-eval`; in a checkout `train.py` and `eval.py` are the same."""

import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from retention.config import IN_CHECKOUT, command_line, compose, override
from retention.evaluation.config import EvalConfig
from retention.training.config import TrainConfig


def train() -> None:
    """Compose, check, train, say where the gates are."""
    command_line("train", _train)


def evaluate() -> None:
    """Compose, check, evaluate, print the table and where the report is.

    `report=<dir> <dir> ...` compares runs instead of evaluating.
    """
    sys.argv[1:] = folders_joined(sys.argv[1:])
    command_line("eval", _evaluate)


def folders_joined(words: list[str]) -> list[str]:
    """A command's words with `report=<dir> <dir> ...` as one list that Hydra reads."""
    first = next((word for word in words if word.startswith("report=") and not word.startswith("report=[")), None)
    if first is None:
        return words
    more = [word for word in words if "=" not in word and not word.startswith("-")]
    folders = [first.removeprefix("report="), *more]
    quoted = ",".join("'" + folder.replace("'", "\\'") + "'" for folder in folders)
    return [f"report=[{quoted}]" if word == first else word for word in words if word not in more]


def _train(config: TrainConfig) -> None:
    _without_progress()
    from retention.training.devices import rank
    from retention.training.run import run

    artefact = run(config)
    if rank() == 0:
        sys.stdout.write(f"gates: {artefact}\nevaluate them: {eval_command(config, artefact)}\n")


def eval_command(config: TrainConfig, artefact: Path) -> str:
    """The shell's line that evaluates trained gates on the model and the task of their run, where eval.py differs."""
    usual = compose("eval")
    assert isinstance(usual, EvalConfig)
    model = config.model
    if config.trainer.lora_rank:
        model = replace(model, adapter=str(artefact.parent / "adapter"))
    given = {"gates": str(artefact)} | _differing(model, usual.model, "model")
    alike = [name for name, task in usual.task.items() if type(task) is type(config.task)]
    task = min(alike, key=lambda name: len(_differing(config.task, usual.task[name], "")))
    given |= _differing(config.task, usual.task[task], f"task.{task}")
    if usual.tasks != [task]:
        given["tasks"] = [task]
    start = ["python", "eval.py"] if IN_CHECKOUT else ["retention-eval"]
    return shlex.join([*start, *(override(name, value) for name, value in given.items())])


def _differing(own: Any, usual: Any, prefix: str) -> dict[str, Any]:
    """Fields of a dataclass that are not as usual, by dotted names."""
    values = {field.name: getattr(own, field.name) for field in fields(own)}
    return {f"{prefix}.{name}": value for name, value in values.items() if value != getattr(usual, name)}


def _evaluate(config: EvalConfig) -> None:
    _without_progress()
    from retention.evaluation.run import run

    result = run(config)
    if not result.files:  # a further process of the run
        return
    sys.stdout.write("\n".join(["", result.table, "", *map(str, result.files), ""]))


def _without_progress() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
