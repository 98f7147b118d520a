"""The rules of the house that no linter knows: sizes, names, imports, docstrings, configs and rows for every method."""

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import retention
from retention.gates import GATES
from retention.objectives import OBJECTIVES
from retention.policies import POLICIES
from retention.tasks import TASKS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "retention"
FILES = sorted(PACKAGE.rglob("*.py"))
REGISTRIES = {"policy": POLICIES, "gate": GATES, "objective": OBJECTIVES, "task": TASKS}
NAMES = [pytest.param(group, name, id=f"{group}-{name}") for group, table in REGISTRIES.items() for name in table]
ANNOTATED = [*sorted((PACKAGE / "ops").glob("*.py")), PACKAGE / "losses.py", PACKAGE / "budget.py"]
SHAPED = {"Float", "Int", "Bool", "UInt8", "Shaped", "Num", "Complex"}
# Lightning's resume files, and gates that others publish: tensors and plain values only
LOADS_CHECKPOINTS = ("retention/training/export.py", "retention/interop/layout.py")
# leaves that only their harness imports, in an environment of its own
ADAPTERS = ("retention.harness.lm_eval", "retention.harness.lmms_eval")
OPTIONAL = ("hydra", "omegaconf", "wandb", "datasets", "peft")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=offline)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public(tree: ast.AST) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public functions, classes and methods of a module, with dotted names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{name}", inner) for name, inner in public(node))


def bare_tensor(annotation: ast.AST | None) -> bool:
    """Whether `Tensor` stands in an annotation outside a shaped type."""
    match annotation:
        case None:
            return False
        case ast.Constant(value=str(text)):
            return bare_tensor(ast.parse(text, mode="eval"))
        case ast.Subscript(value=ast.Name(id=name)) if name in SHAPED:
            return False
        case ast.Name(id="Tensor") | ast.Attribute(attr="Tensor"):
            return True
    return any(bare_tensor(child) for child in ast.iter_child_nodes(annotation))


def test_files_stay_short() -> None:
    lengths = {named(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    ordered = sorted(lengths.values())
    assert statistics.median(ordered) <= 110
    assert ordered[int(0.9 * (len(ordered) - 1))] <= 300


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "misc", "helpers", "helper"}
    assert [named(file) for file in FILES if drawers & {file.stem, *file.relative_to(PACKAGE).parts[:-1]}] == []


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {file.parent for file in FILES}
    assert sorted(named(folder) for folder in folders if not (folder / "__init__.py").exists()) == []


def test_source_is_ascii() -> None:
    sources = [*FILES, *PACKAGE.rglob("*.j2")]
    assert [named(file) for file in sources if not file.read_bytes().isascii()] == []


def test_forbidden_constructs() -> None:
    for file in (*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *ROOT.glob("*.py")):
        tree, inside = ast.parse(file.read_text()), file.is_relative_to(PACKAGE)
        for node in ast.walk(tree):
            where = f"{named(file)}:{getattr(node, 'lineno', 0)}"
            match node:
                case ast.ImportFrom(module="__future__", names=names):
                    assert all(alias.name != "annotations" for alias in names), where
                case ast.Import(names=names) if inside:
                    assert all(alias.name.split(".")[0] not in ("pickle", "cloudpickle") for alias in names), where
                case ast.ImportFrom(module="pickle" | "cloudpickle") if inside:
                    pytest.fail(where)
                case ast.Attribute(value=ast.Name(id="torch"), attr="load") if inside:
                    assert named(file) in LOADS_CHECKPOINTS, where
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=given) if inside:
                    assert "weights_only=True" in [ast.unparse(keyword) for keyword in given], where


def test_configs_name_no_targets() -> None:
    assert [named(file) for file in (ROOT / "configs").rglob("*.yaml") if "_target_" in file.read_text()] == []


def test_shipped_data_is_small() -> None:
    data = (file for folder in ("weights", "images") for file in (PACKAGE / "embedded" / folder).rglob("*"))
    assert sum(file.stat().st_size for file in data if file.is_file()) <= 8 * 2**20


def test_public_names_are_sorted_and_resolve() -> None:
    constants, classes, functions = [], [], []
    for name in retention.__all__:
        kind = constants if name.isupper() else classes if name[0].isupper() else functions
        kind.append(name)
        assert getattr(retention, name) is not None
    assert retention.__all__ == sorted(constants) + sorted(classes) + sorted(functions)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = retention.nothing_of_the_kind


def test_public_functions_and_classes_have_docstrings() -> None:
    found = ((file, name, node) for file in FILES for name, node in public(ast.parse(file.read_text())))
    assert [f"{named(file)}: {name}" for file, name, node in found if ast.get_docstring(node) is None] == []


@pytest.mark.parametrize("file", ANNOTATED, ids=named)
def test_public_tensors_have_shapes(file: Path) -> None:
    bare = []
    for name, node in public(ast.parse(file.read_text())):
        if isinstance(node, Function):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            annotations = [*(argument.annotation for argument in arguments), node.returns]
            bare += [name for annotation in annotations if bare_tensor(annotation)]
    assert bare == []


def test_importing_the_package_is_light_and_registers_nothing() -> None:
    heavy = python(
        "import retention, sys; print([x for x in ('torch', 'transformers', 'lightning', 'hydra') if x in sys.modules])"
    )
    assert heavy == "[]"
    registered = python(
        "import importlib, pkgutil, retention\n"
        "names = [module.name for module in pkgutil.walk_packages(retention.__path__, 'retention.')]\n"
        f"for name in names: name in {ADAPTERS} or importlib.import_module(name)\n"
        "from hydra.core.config_store import ConfigStore\n"
        "from transformers import AttentionInterface\n"
        "from transformers.masking_utils import AttentionMaskInterface\n"
        "keys = [*AttentionInterface().valid_keys(), *AttentionMaskInterface().valid_keys(), *ConfigStore.instance().repo]\n"
        "print([key for key in keys if 'retention' in key or 'schema' in key])"
    )
    assert registered == "[]"


def test_entry_points_import_without_optional_packages() -> None:
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in OPTIONAL)
    code += "import retention, retention.training.run, retention.evaluation.run\n"
    assert python(code + "print(callable(retention.training.run.run), callable(retention.evaluation.run.run))") == (
        "True True"
    )


@pytest.mark.parametrize(("group", "name"), NAMES)
def test_registered_names_have_a_config(group: str, name: str) -> None:
    file = ROOT / "configs" / group / f"{name}.yaml"
    assert f"{name}_schema" in yaml.safe_load(file.read_text())["defaults"]


@pytest.mark.parametrize(("group", "name"), NAMES)
def test_registered_names_have_a_readme_row(group: str, name: str) -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(f"`{name}`" in row for row in rows), f"README.md has no table row with `{name}` ({group})"
