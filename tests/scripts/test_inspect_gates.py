"""The page about a gate checkpoint: on pictures of the base's own, on a text, on a picture, and what is refused."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retention.gates import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.models.load import load_frozen
from tests import hub, zoo
from tests.evaluation.test_report import checked

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("inspect_gates", SCRIPTS / "inspect_gates.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["inspect_gates"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPTS))
    del sys.modules["inspect_gates"], sys.modules["gates_page"]


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    torch.manual_seed(0)
    model, _ = load_frozen("embedded")
    made, folder = RetentionGates.for_model(DBTrim(init_half_life=50.0), model), tmp_path_factory.mktemp("gates")
    made.save_pretrained(folder)
    return folder


def test_the_page_of_the_bases_own_pictures(script, gates, tmp_path):
    script.main([str(gates), "--out", str(tmp_path / "g.html"), "--count", "5"])
    page = (tmp_path / "g.html").read_text()
    read = checked(page)
    assert read.headings[1:] == ["Half-lives by layer and head", "Kinds of tokens, the most retained first", "Tokens that live longest and shortest", "The input, as the gates rank it", "Artefact"]  # fmt: skip
    assert page.count("<figure>") == 3
    assert page.count("[image ") > 10
    assert page.count('class="verdict prompt"') == 10
    assert len(read.pictures) == 3 + 2 * 16


def test_a_text_and_a_picture_of_the_users(script, gates, tmp_path):
    (tmp_path / "t.txt").write_text("red A is 7, blue B 3.")
    Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(tmp_path / "p.png")
    told = ["--text", str(tmp_path / "t.txt"), "--image", str(tmp_path / "p.png"), "--out", str(tmp_path / "g.html")]
    script.main([str(gates), *told])
    page = (tmp_path / "g.html").read_text()
    assert len(checked(page).pictures) == 3 + 2
    with pytest.raises(SystemExit, match="expected a file, got nowhere"):
        script.main([str(gates), "--text", "nowhere"])
    with pytest.raises(SystemExit, match="expected a gate artefact"):
        script.main([str(tmp_path)])


def test_kinds_are_counted_and_ranked(script, gates):
    kept = np.zeros((1, 2, 40), bool)
    kept[:, 0, :4] = kept[:, 1, -4:] = True
    tokens = ["<bos>", *[" a"] * 20, *[" 12"] * 9, *[" ,"] * 10]
    shown = script.Shown("x", tokens, np.zeros(40, bool), None, [], [])
    found = script.Found(shown, "half-life in tokens", np.arange(80.0).reshape(1, 2, 40), kept)
    rows = {row["kind"]: row for row in script.kinds(found, {"<bos>"})}
    assert {name: row["tokens"] for name, row in rows.items()} == {
        "special": 1, "words": 20, "digits": 9, "punctuation": 10, "the first 4": 4, "the newest 10%": 4,
    }  # fmt: skip
    assert rows["the first 4"]["kept"] == rows["the newest 10%"]["kept"] == 0.5
    assert rows["the first 4"]["lift"] == pytest.approx(5.0)
    assert rows["digits"]["kept"] == 0.0
    longest, shortest = script.extremes(found, 2)
    assert [row["place"] for row in longest[1]] == [39, 38]
    assert [row["place"] for row in shortest[1]] == [0, 1]
    gates = RetentionGates.from_pretrained(gates)
    assert "Sinks: the first 4 tokens are kept by 50%, 50%, 50%, 50%" in script.notes(found, gates)[1]
    assert "in 1 of 2 heads over 80%" in script.notes(found, gates)[2]


def test_what_tokens_are_made_of(script):
    kinds = [script.kind_of(token, False) for token in (" word", "42", "...", " ", "a1", "+")]
    assert kinds == ["words", "digits", "punctuation", "blanks", "mixed", "symbols"]
    assert script.kind_of("<eos>", True) == "special"


def test_bases_of_the_hub_read_text_or_pictures_of_any_size(script, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    text = tmp_path / "text"
    Qwen2ForCausalLM(Qwen2Config(**hub.TEXT)).save_pretrained(text)
    hub.tokenizer({}).save_pretrained(text)
    for base, pictures in ((text, 3), (zoo.saved("qwen2_vl"), 3 + 2 * 4)):
        model, _ = load_frozen(str(base))
        RetentionGates.for_model(DBTrim(), model).save_pretrained(tmp_path / "gates")
        script.main([str(tmp_path / "gates"), "--out", str(tmp_path / "g.html")])
        assert len(checked((tmp_path / "g.html").read_text()).pictures) == pictures
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    model, _ = load_frozen(str(text))
    RetentionGates.for_model(DBTrim(), model).save_pretrained(tmp_path / "gates")
    with pytest.raises(SystemExit, match="reads text alone"):
        script.main([str(tmp_path / "gates"), "--image", str(tmp_path / "p.png")])
