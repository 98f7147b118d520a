"""Every YAML composes into live objects, and a mistake in an override fails by name."""

import sys
from pathlib import Path

import pytest
import yaml
from hydra.errors import ConfigCompositionException, MissingConfigException

from retention.cache.config import CacheConfig
from retention.config import CONFIG_DIR, command_line, compose
from retention.evaluation.config import EvalConfig
from retention.gates import GATES
from retention.models.load import ModelConfig
from retention.objectives import OBJECTIVES
from retention.policies import POLICIES
from retention.tasks import TASKS
from retention.training.config import DataConfig, TrainConfig, TrainerConfig

ROOT = Path(__file__).parents[1]
ROOTS = {"train": TrainConfig, "eval": EvalConfig}
TABLES = ("policy", "task")
CHOICES = {
    "train": ("model", "gate", "objective", "task", "data", "trainer", "memory"),
    "eval": ("model", "cache"),
}
SOME_MODEL = "model.name=someone/some-model"


def presets(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))


PRESETS = [
    pytest.param(root, f"{group}={name}", id=f"{root}-{group}-{name}")
    for root, groups in CHOICES.items()
    for group in groups
    for name in presets(group)
]


def test_every_folder_of_configs_is_covered() -> None:
    covered = {*CHOICES["train"], *CHOICES["eval"], *TABLES, "experiment", "hydra"}  # launchers: test_sweeps
    assert {folder.name for folder in CONFIG_DIR.iterdir() if folder.is_dir()} <= covered
    assert {file.stem for file in CONFIG_DIR.glob("*.yaml")} == set(ROOTS)


@pytest.mark.parametrize("root", ROOTS)
def test_roots_compose(root: str) -> None:
    assert type(compose(root)) is ROOTS[root]


@pytest.mark.parametrize(("root", "choice"), PRESETS)
def test_presets_compose(root: str, choice: str) -> None:
    assert type(compose(root, [choice, SOME_MODEL])) is ROOTS[root]


@pytest.mark.parametrize("group", TABLES)
def test_eval_knows_every_preset_of_its_tables(group: str) -> None:
    assert set(getattr(compose("eval"), group)) == set(presets(group))


@pytest.mark.parametrize("name", presets("experiment"))
def test_experiments_compose_and_are_short_diffs(name: str) -> None:
    text = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_")
    assert len(text.splitlines()) <= 15
    failures = {}
    for root in ROOTS:
        try:
            compose(root, [f"experiment={name}", SOME_MODEL])
        except (ConfigCompositionException, ValueError) as error:
            failures[root] = str(error)
    assert len(failures) < len(ROOTS), failures


def test_configs_are_live_objects() -> None:
    train, evaluate = compose("train"), compose("eval")
    assert isinstance(train, TrainConfig)
    assert isinstance(evaluate, EvalConfig)
    assert type(train.gate) in GATES.values()
    assert type(train.objective) in OBJECTIVES.values()
    assert type(train.task) in TASKS.values()
    assert (type(train.model), type(train.data), type(train.trainer)) == (ModelConfig, DataConfig, TrainerConfig)
    kinds = {name: type(policy) for name, policy in evaluate.policy.items()}
    assert {name: kinds[name] for name in POLICIES} == POLICIES
    assert set(kinds.values()) == set(POLICIES.values())
    assert all(type(task) in TASKS.values() for task in evaluate.task.values())
    assert type(evaluate.cache) is CacheConfig


def test_overrides_reach_the_objects() -> None:
    config = compose("train", ["gate=trim", "gate.gate_hidden=7", "trainer.max_steps=3", "model.device=cpu"])
    assert isinstance(config, TrainConfig)
    assert type(config.gate) is GATES["trim"]
    assert (config.gate.gate_hidden, config.trainer.max_steps, config.model.device) == (7, 3, "cpu")


def test_quota_control_is_a_policy_name() -> None:
    config = compose("eval", ["policies=[quota+keydiff,keydiff]", "gates=null"])
    assert isinstance(config, EvalConfig)
    assert config.policies == ["quota+keydiff", "keydiff"]


@pytest.mark.parametrize(
    ("root", "overrides"),
    [
        pytest.param("train", ["trainer.max_step=3"], id="misspelt"),
        pytest.param("train", ["trainer.max_steps=many"], id="wrong type"),
        pytest.param("train", ["gate=trim", "gate.scoring=scalar"], id="key of another gate"),
        pytest.param("eval", ["policy.snapkv.windw_size=3"], id="misspelt in a policy"),
        pytest.param("eval", ["policy.snapkv.window_size=abc"], id="wrong type in a policy"),
        pytest.param("eval", ["policy.knorm.window_size=8"], id="key of another policy"),
    ],
)
def test_wrong_keys_and_types_are_named(root: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        compose(root, overrides)
    assert overrides[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("root", "override", "words"),
    [
        ("eval", "policy.snapkv.window_size=500", ("snapkv.window_size", "64", "500")),
        ("eval", "policy.h2o.normalise=twice", ("h2o.normalise", "visible", "raw", "twice")),
        ("eval", "policies=[no_such]", ("policies", "snapkv", "quota+", "no_such")),
        ("eval", "tasks=[haystack]", ("tasks", "needles", "haystack")),
        ("eval", "budgets=['150%']", ("fraction", "1.5")),
        ("eval", "budgets=[plenty]", ("budget", "plenty", "128", "10%", "64MiB")),
        ("eval", "protocols=[sometimes]", ("sometimes",)),
        ("eval", "split=train", ("split", "test", "val", "train")),
        ("eval", "cache.allocator=fair", ("cache.allocator", "uniform", "fair")),
        ("eval", "cache.budget.amount=-1", ("budget", "above 0", "-1")),
        ("train", "trainer.max_steps=0", ("trainer.max_steps", "at least 1", "got 0")),
        ("train", "objective.scope=galactic", ("objective.scope", "global", "local", "galactic")),
        ("train", "model.dtype=int8", ("model.dtype", "float32", "int8")),
        ("train", "model.name=???", ("model.name",)),
        ("train", "logger=paper", ("logger", "wandb", "csv", "paper")),
        ("train", "task.n_needles=9999", ("task.n_needles", "9999")),
    ],
)
def test_impossible_values_are_named(root: str, override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        compose(root, [override])
    missing = [word for word in words if word not in str(caught.value)]
    assert missing == [], f"{caught.value} does not say {missing}"


def test_protected_sizes_fit_the_budget() -> None:
    with pytest.raises(ValueError, match=r"sink_size \+ recent_size = 8"):
        compose("eval", ["cache.budget.unit=tokens", "cache.budget.amount=8", "cache.sink_size=8"])


def test_unknown_presets_list_the_known_ones() -> None:
    with pytest.raises(MissingConfigException, match="dbtrim") as caught:
        compose("train", ["gate=nope"])
    assert "gate/nope" in str(caught.value)


def test_command_line_shows_its_config(monkeypatch, capsys) -> None:
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # else train.log stays open
    monkeypatch.setattr(sys, "argv", ["train.py", "--cfg", "job", *quiet, "trainer.max_steps=5"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which is set anyway, and taken back behind the test
    command_line("train", pytest.fail)
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.max_stepss=3"], r"got 'trainer.max_stepss'; did you mean trainer.max_steps or"),
        (["gate=nope"], "expected gate among dbtrim, dbtrim_scalar, .*, got 'nope'"),
        (["trainer.max_steps=many"], "trainer.max_steps: Value 'many' of type 'str'"),
        (["trainer.max_steps"], "expected name=value, got 'trainer.max_steps'"),
    ],
    ids=str,
)
def test_a_refused_setting_is_told_in_one_sentence(words, told, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which is set anyway, and taken back behind the test
    with pytest.raises(SystemExit, match=f"^error: .*{told}") as caught:
        command_line("train", pytest.fail)
    assert "\n" not in str(caught.value)


def test_a_setting_that_no_field_stands_for_cannot_be_added() -> None:
    with pytest.raises(ValueError, match=r"expected a setting, got 'trainer\.foo'"):
        compose("train", ["+trainer.foo=3"])
