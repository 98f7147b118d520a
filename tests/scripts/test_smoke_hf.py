"""The smoke check on tiny checkpoints in the hub's layout, as a user runs it."""

import sys

import pytest

from scripts import smoke_hf
from tests import hub, zoo


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["smoke_hf.py", *map(str, arguments)])
    return smoke_hf.main(), capsys.readouterr().out


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava_next"])
def test_a_vision_language_model(monkeypatch, capsys, family):
    failed, out = run(monkeypatch, capsys, zoo.saved(family), "--dtype", "float32", "--images", 2, "--steps", 3)
    assert failed == 0
    assert f"{family} (listed)" in out
    assert "6 of 6 checks hold" in out
    assert all(f"      {name:20}" in out for name in ("full", "snapkv", "kvzip", "tgv_kv", "random"))
    assert "tokens/s full" in out


def text_model(folder):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(**hub.TEXT)).save_pretrained(folder)
    hub.tokenizer({}).save_pretrained(folder)


def test_a_text_model_in_half_precision(monkeypatch, capsys, tmp_path):
    text_model(tmp_path)
    failed, out = run(monkeypatch, capsys, tmp_path, "--facts", 12, "--steps", 3)
    assert failed == 0
    assert "5 of 5 checks hold" in out
    assert "What is the number of" in out


def test_what_is_off_is_reported(monkeypatch, capsys, tmp_path):
    text_model(tmp_path)
    monkeypatch.setitem(smoke_hf.TOLERANCE, smoke_hf.torch.bfloat16, -1.0)
    failed, out = run(monkeypatch, capsys, tmp_path, "--facts", 12, "--steps", 3)
    assert failed == 1
    assert "FAIL  gates that never forget give the base" in out
    assert "to report:" in out
    assert "transformers:" in out.split("to report:")[1]
