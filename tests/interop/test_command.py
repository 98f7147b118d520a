"""The commands `import` and `export`, from the shell's words to files that load."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from retention.gates import RetentionGates
from retention.interop import kvzap
from retention.interop.command import IMPORTERS, TARGETS
from retention.interop.kept import Kept
from tests import hub
from tests.interop import published
from tests.tiny import tiny_qwen3


def called(monkeypatch, *words):
    from retention.__main__ import main

    monkeypatch.setattr(sys, "argv", ["retention", *map(str, words)])
    main()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_qwen3(vocab_size=hub.VOCAB).save_pretrained(folder)
    hub.tokenizer({}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """KVzap gates as they are published, for the tiny Qwen3."""
    folder, (tensors, config) = tmp_path_factory.mktemp("kvzap"), published.kvzap(8)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def artefact(downloaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates") / "gates"
    kvzap.load(downloaded, tiny_qwen3(vocab_size=hub.VOCAB)).save_pretrained(folder)
    return folder


def test_import_makes_an_artefact_for_the_base(downloaded, base, tmp_path, monkeypatch, capsys):
    words = "--kind", "kvzap", "--base", base, "--out", tmp_path / "gates", "--storage", "bfloat16"
    called(monkeypatch, "import", downloaded, *words)
    assert capsys.readouterr().out.splitlines() == [
        f"gates: {tmp_path / 'gates'}",
        "policies that rank by them: kvzap",
        "as published: cache.selector=threshold cache.threshold=-4",
    ]
    model, gates = tiny_qwen3(vocab_size=hub.VOCAB), RetentionGates.from_pretrained(tmp_path / "gates")
    gates.check(model)
    for name, x in kvzap.load(downloaded, model).tensors().items():
        assert torch.equal(gates.tensors()[name], x.bfloat16().float())


def test_export_writes_each_target(artefact, base, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompt.txt").write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z")
    more = {
        "programs": ["--dtype", "bfloat16"],
        "kept": ["--prompt", tmp_path / "prompt.txt", "--budget", "5", "--base", base],
    }
    for target in TARGETS:
        called(monkeypatch, "export", artefact, "--to", target, "--out", tmp_path / target, *more.get(target, []))
    assert (tmp_path / "press" / "retention_press.py").exists()
    program = torch.export.load(tmp_path / "programs" / "layer_0.pt2").module()
    assert program(torch.zeros(1, 4, published.HIDDEN, dtype=torch.bfloat16)).shape == (1, published.KV_HEADS, 4)
    kept = Kept.load(tmp_path / "kept")
    assert int(kept.counts.sum()) == 5 * kept.counts.numel()
    assert (kept.about["policy"], int(kept.seen[0]) > 5) == ("KVzap", True)
    assert (
        f"({5 * kept.counts.numel()} of {int(kept.seen[0]) * kept.counts.numel()} entries)" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["import", "{}", "--kind", "zip", "--base", "b", "--out", "o"],
            f"--kind among {', '.join(IMPORTERS)}, got 'zip'",
        ),
        (
            ["import", "{}/no", "--kind", "kvzap", "--base", "b", "--out", "o"],
            "expected downloaded gates at .*no, found nothing",
        ),
        (["import", "{}", "--kind", "kvzap", "--base", "./no", "--out", "o"], "cannot load a model from './no'"),
        (["export", "{}", "--to", "gguf", "--out", "o"], "--to among press, programs, kept, got 'gguf'"),
        (["export", "{}", "--to", "press", "--out", "o", "--budget", "5"], "no --budget for --to press"),
        (
            ["export", "{}", "--to", "programs", "--out", "o", "--budget", "5%"],
            "--budget of programs in entries per head",
        ),
        (["export", "{}", "--to", "kept", "--out", "o"], "expected a text file .*--prompt"),
        (["export", "{}", "--to", "kept", "--out", "o", "--prompt", "p"], "expected the base .--base"),
        (["export", "{}/no", "--to", "press", "--out", "o"], "expected a gate artefact with gate_config.json"),
        (["export", "{}", "--to", "kept", "--out", "o", "--prompt", "{}/no", "--base", "b"], "No such file"),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing(words, reason, artefact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{reason}[^\n]*$"):
        called(monkeypatch, *(word.format(artefact) for word in words))
    assert list(tmp_path.iterdir()) == []
