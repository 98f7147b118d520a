"""Hydra's only door: registers schemas, composes YAML and overrides into typed configs.

The dataclasses are the schemas; the files of `configs/` only differ from their defaults.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
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

_SHIPPED = Path(__file__).with_name("configs")
IN_CHECKOUT = not _SHIPPED.is_dir()
"""Whether `train.py` and `eval.py` are beside the package."""
CONFIG_DIR = Path(__file__).parents[1] / "configs" if IN_CHECKOUT else _SHIPPED
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
    _register_roots()
    for group, table in _GROUPS.items():
        for name, schema in table.items():
            _register_schema(group, name, schema)


@cache
def _register_roots() -> None:
    store = ConfigStore.instance()
    train = OmegaConf.structured(TrainConfig)
    for part in ("gate", "objective", "task", "memory"):
        train[part] = MISSING
    store.store(name="train_schema", node=train)
    store.store(name="eval_schema", node=EvalConfig)
    store.store(name="tables", node=_tables())


@cache
def _register_schema(group: str, name: str, schema: Any) -> None:
    """Each once: Hydra keeps them and hands out copies, and turning all into nodes is half of a composition's time."""
    ConfigStore.instance().store(group=group, name=f"{name}_schema", node=schema)


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
        for name in (name for name, known in _settings(config) if not known):  # added with a +
            raise ValueError(f"expected a setting, got {name!r}; --help lists all")
        return OmegaConf.to_object(config)  # type: ignore[return-value]  # the root schema decides the class
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{where}{str(error).splitlines()[0]}") from error


@contextmanager
def _aside() -> Iterator[None]:
    """Inside, configs can be composed in the middle of an entry point, whose own Hydra comes back."""
    state = GlobalHydra.instance()
    running, state.hydra = state.hydra, None
    try:
        yield
    finally:
        state.hydra = running


def override(name: str, value: Any) -> str:
    """A setting as Hydra's command line reads it."""
    return f"{name}={_written(value)}"


def _written(value: Any) -> str:
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
    """Compose `train` or `eval` with overrides, as the entry points do, also in the middle of one."""
    register()
    with _aside(), hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return to_config(hydra.compose(root, list(overrides)))


def command_line(root: str, task: Callable[[Any], None]) -> None:
    """Compose `train` or `eval` from the command line, Hydra's flags and sweeps included, and hand the config to `task`.

    A `ValueError`, from the checks of the settings or from the task, ends the process with its one sentence, and so do
    settings that Hydra refuses.
    """

    def job(composed: DictConfig) -> None:
        try:
            task(to_config(composed))
        except ValueError as error:
            sys.exit(f"error: {error}")

    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # by which Hydra raises what it would print over many lines
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=root)(job)()
    except OverrideParseException as error:
        told = f"expected name=value, got {error.override!r}; put values with brackets, spaces or commas in quotes"
        sys.exit(f"error: {told}")
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        sys.exit(f"error: expected {group} among {', '.join(presets(group))}, got {name!r}")
    except ConfigCompositionException as error:
        sys.exit(f"error: {_refused(root, error)}")


def _refused(root: str, error: ConfigCompositionException) -> str:
    """Why a setting cannot be what it is given, or which name might have been meant."""
    key, why = getattr(error.__cause__, "full_key", None), str(error.__cause__ or error).splitlines()[0]
    with _aside(), hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        known = [name for name, _ in _settings(hydra.compose(root))]
    if key is None or key in known:
        return f"{key}: {why}" if key else why
    near = get_close_matches(key, known)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"expected a setting, got {key!r}; {meant}--help lists all"


def _settings(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted names of all values of a composed config and of their groups, and whether the schema knows them."""
    kind = OmegaConf.get_type(config)
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else set(config)
    for key, value in config.items_ex(resolve=False):
        name = str(key)
        yield f"{prefix}{name}", name in known
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from _settings(value, f"{prefix}{name}.")
