"""Every command and every line of Python in the README works as written."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands(start: str) -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(start)]


@pytest.mark.parametrize("words", commands("python train.py") + commands("python eval.py"), ids=" ".join)
def test_its_commands_compose(words, tmp_path, monkeypatch):
    from retention.config import compose

    overrides = [word for word in words[2:] if word not in ("--help", "-m") and not word.startswith("hydra/")]
    if "-m" in words:  # one run of the sweep
        overrides = [word if "{" in word else word.split(",")[0] for word in overrides]
    config = compose(words[1].removesuffix(".py"), overrides)
    for word in overrides:
        key, value = word.split("=", 1)
        if "." in key and not key.startswith("task.") and not value.startswith("["):
            part, name = key.split(".")
            assert str(getattr(getattr(config, part), name)).lower() == value.lower()


def test_its_scripts_and_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for words in commands("make"):
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
    for words in commands("python scripts"):
        assert (ROOT / words[1]).is_file()
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_its_plan_is_made(tmp_path):
    from retention.__main__ import parser
    from retention.planning.command import run
    from tests.tiny import tiny_qwen3

    tiny_qwen3().config.save_pretrained(tmp_path)
    for words in commands("python -m retention"):
        told = run(parser().parse_args([str(tmp_path / word) if word == "config.json" else word for word in words[3:]]))
        assert "GiB" in told


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    import torch

    import retention as rt
    from retention.gates.dbtrim import DBTrim

    torch.manual_seed(0)
    model, _ = rt.load_frozen()
    rt.RetentionGates.for_model(DBTrim(), model).save_pretrained(tmp_path / "outputs" / "latest" / "gates")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["cache"].kept().sum() < names["other"].kept().sum() + names["question"].shape[1] * 8 + 1
    kept = round(0.1 * 291) * 8
    assert f"({kept})" in capsys.readouterr().out


def test_every_registered_name_has_a_row():
    from retention.budget import ALLOCATORS
    from retention.config import presets
    from retention.models import FAMILIES

    names = [*ALLOCATORS, *FAMILIES, *(p for group in ("policy", "gate", "objective", "task") for p in presets(group))]
    rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    for name in names:
        assert any(f"`{name}`" in row for row in rows), name
