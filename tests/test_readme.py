"""Every command and every line of Python in the README works as written."""

import re
import shlex

import pytest

from tests.pages import ROOT, check, commands, run_python

TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("words", commands(TEXT), ids=shlex.join)
def test_its_commands_would_start(words):
    check(words)


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    import torch

    import retention as rt
    from retention.gates.dbtrim import DBTrim

    torch.manual_seed(0)
    model, _ = rt.load_frozen()
    rt.RetentionGates.for_model(DBTrim(), model).save_pretrained(tmp_path / "outputs" / "latest" / "gates")
    monkeypatch.chdir(tmp_path)
    names = run_python(TEXT, "README.md", {})
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
