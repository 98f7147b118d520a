"""The check of exported presses without kvpress: our side, what counts as a failure, the page."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("check_press")


def row(**changes):
    return {"family": "llama", "gates": "trim", "objective": "distillation", "difference": 0.0, "scale": 1.0, "heads": 8, "equal": 8, "held": [128]} | changes  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_both_sides_say_alike_is_no_failure_and_anything_else_is(script, family, tmp_path):
    model = script.write_model(tmp_path, family)
    gates = script.random_gates(model, *script.GATES["fastkvzip"])
    ids = load_file(tmp_path / "ids.safetensors")["ids"]
    scores, kept = script.own(model, gates, ids)
    assert int(kept.sum()) == 8 * script.BUDGET
    raw = torch.logit(scores.double().exp()).float()  # the press ranks before the log of the sigmoid
    save_file({"scores": raw, "kept": kept}, tmp_path / "out.safetensors")
    found = script.compared(gates, model, ids, tmp_path, {"held": [script.BUDGET] * 2})
    assert script.failures([row(**found)]) == []
    other = kept.roll(1, -1)
    save_file({"scores": raw + 0.5, "kept": other}, tmp_path / "out.safetensors")
    said = script.failures([row(**script.compared(gates, model, ids, tmp_path, {"held": [script.BUDGET]}))])
    assert ["scores differ" in said[0], "8 of 8 heads keep other positions" in said[1]] == [True, True]


def test_another_number_of_entries_is_a_failure(script):
    assert "kvpress holds [127]" in script.failures([row(held=[127])])[0]


def test_the_page_names_every_row(script):
    versions = {"kvpress": "1", "torch": "2", "transformers": "3"}
    text = script.page({"rows": [row(gates=name) for name in script.GATES], "versions": versions})
    assert all(f"| llama | {name} |" in text for name in script.GATES)
    assert "kvpress) 1 (torch 2, transformers 3)" in text
