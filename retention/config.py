"""Hydra's only door: registers schemas, composes YAML and overrides into typed configs.

The dataclasses are the schemas; the files of `configs/` only differ from their defaults.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
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

CONFIG_DIR = Path(__file__).parents[1] / "configs"
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
    tables = [{f"{group}@{group}.{name}": name} for group in ("policy", "task") for name in presets(group)]
    store.store(name="tables", node={"defaults": tables})


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


def compose(root: str, overrides: Sequence[str] = ()) -> TrainConfig | EvalConfig:
    """Compose `train` or `eval` with overrides, as the entry points do; for tests and scripts."""
    register()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return to_config(hydra.compose(root, list(overrides)))
