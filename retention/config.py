"""Hydra's only door: registers schemas, composes YAML and overrides into typed configs.

The dataclasses are the schemas; the files of `configs/` only differ from their defaults.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retention.cache.config import CacheConfig
from retention.evaluation.config import EvalConfig
from retention.gates import GATES
from retention.memory import MEMORIES
from retention.models.load import ModelConfig
from retention.objectives import OBJECTIVES
from retention.policies import POLICIES
from retention.tasks import TASKS
from retention.training.config import DataConfig, TrainConfig, TrainerConfig

_CHECKOUT = Path(__file__).parents[1] / "configs"
_SHIPPED = Path(__file__).with_name("configs")
CONFIG_DIR = _SHIPPED if _SHIPPED.is_dir() else _CHECKOUT
"""The YAML files: beside the package in a checkout, inside it where it was installed from a wheel."""
_GROUPS: dict[str, Mapping[str, Any]] = {
    "policy": POLICIES,
    "gate": GATES,
    "task": TASKS,
    "objective": OBJECTIVES,
    "memory": MEMORIES,
    "model": {"model": ModelConfig},
    "data": {"data": DataConfig},
    "trainer": {"trainer": TrainerConfig},
    "cache": {"cache": CacheConfig},
}


def presets(group: str) -> list[str]:
    """Names of the YAML files of a group."""
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))


def register() -> None:
    """Make the schemas known to Hydra, and tables of all policies and all tasks for `eval.yaml`."""
    store = ConfigStore.instance()
    train = OmegaConf.structured(TrainConfig)
    for part in ("gate", "objective", "task", "memory"):
        train[part] = MISSING
    store.store(name="train_schema", node=train)
    store.store(name="eval_schema", node=EvalConfig)
    for group, table in _GROUPS.items():
        for name, schema in table.items():
            store.store(group=group, name=f"{name}_schema", node=schema)
    store.store(name="tables", node=_tables())


@cache
def _tables() -> dict[str, dict[str, DictConfig]]:
    """Every preset of policies and tasks by name; merged here, since Hydra takes seconds for so many."""
    return {group: {name: _preset(group, name) for name in presets(group)} for group in ("policy", "task")}


def _preset(group: str, name: str) -> DictConfig:
    """A preset's file on top of the schema, or of the preset, that it names as its default."""
    own = OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml")
    assert isinstance(own, DictConfig)
    (base,) = own.pop("defaults")
    schema = _GROUPS[group].get(base.removesuffix("_schema")) if base.endswith("_schema") else None
    merged = OmegaConf.merge(OmegaConf.structured(schema) if schema is not None else _preset(group, base), own)
    assert isinstance(merged, DictConfig)
    return merged


def to_config(config: DictConfig) -> TrainConfig | EvalConfig:
    """The typed object a composed config stands for; its checks run here.

    Raises:
        ValueError: with one sentence, for a value no check accepts.
    """
    try:
        return OmegaConf.to_object(config)  # type: ignore[return-value]  # the root schema decides the class
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{where}{str(error).splitlines()[0]}") from error


def eval_command(config: TrainConfig, artefact: Path) -> str:
    """The shell's line that evaluates trained gates on the model and the task of their run, where eval.py differs."""
    with _aside():
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
    start = ["python", "eval.py"] if CONFIG_DIR == _CHECKOUT else ["retention-eval"]
    return shlex.join([*start, *(f"{name}={_written(value)}" for name, value in given.items())])


@contextmanager
def _aside() -> Iterator[None]:
    """Inside, configs can be composed in the middle of an entry point, whose own Hydra comes back."""
    state = GlobalHydra.instance()
    running, state.hydra = state.hydra, None
    try:
        yield
    finally:
        state.hydra = running


def _differing(own: Any, usual: Any, prefix: str) -> dict[str, Any]:
    """Fields of a dataclass that are not as usual, by dotted names."""
    values = {field.name: getattr(own, field.name) for field in fields(own)}
    return {f"{prefix}.{name}": value for name, value in values.items() if value != getattr(usual, name)}


def _written(value: Any) -> str:
    """A value as Hydra's overrides read it."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_/.][\w/.:@+-]*", value) and value.lower() not in (
            "null",
            "true",
            "false",
            "nan",
            "inf",
        )
        return value if plain else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)


def compose(root: str, overrides: Sequence[str] = ()) -> TrainConfig | EvalConfig:
    """Compose `train` or `eval` with overrides, as the entry points do; for tests and scripts."""
    register()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return to_config(hydra.compose(root, list(overrides)))


def command_line(root: str, task: Callable[[Any], None]) -> None:
    """Compose `train` or `eval` from the command line, Hydra's flags and sweeps included, and hand the config to `task`.

    A `ValueError`, from the checks of the settings or from the task, ends the process with its one sentence.
    """

    def job(composed: DictConfig) -> None:
        try:
            task(to_config(composed))
        except ValueError as error:
            sys.exit(f"error: {error}")

    register()
    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=root)(job)()
