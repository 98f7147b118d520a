"""The model card: metadata the hub reads, the accuracy curve and its picture, and no way out of its cells."""

import io

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.types import ModelShape

SHAPE = ModelShape("qwen3", (0, 1), num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)
BASE = {"name_or_path": "someone/base-1.5", "revision": "main", "commit": "c0ffee", "weight_hash": "77"}


def card_of(folder, base=BASE, **training):
    gates = RetentionGates(Trim(gate_hidden=4), SHAPE, base)
    gates.training_record = training
    gates.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def table(card):
    """Cells of the accuracy table by its first column."""
    part = card.text.split("## Accuracy by budget")[1].split("## Use")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_front_matter_is_metadata_the_hub_reads(tmp_path):
    data = card_of(tmp_path / "gates").data
    assert (data.library_name, data.base_model) == ("retention", "someone/base-1.5")
    assert data.tags == ["kv-cache", "retention-gates", "trim"]


@pytest.mark.parametrize("name", ["embedded", "/home/me/base", "../base", "a/b/c", "", "a/b\n---\nlicense: mit", None])
def test_a_base_that_is_no_hub_id_is_left_out_of_the_metadata(tmp_path, name):
    data = card_of(tmp_path / "gates", {"name_or_path": name}).data
    assert data.base_model is None
    assert data.license is None


def test_the_card_says_what_the_gates_are_of(tmp_path):
    card = card_of(
        tmp_path / "gates", task="needles", budget="1%-8%", loss_weights={"kl": 1.0}, task_settings={"n_images": 16}
    )
    for told in (
        "someone/base-1.5", "main, c0ffee", "task needles; budget 1%-8%", "loss_weights {'kl': 1.0}", "'n_images': 16",
        "| memory of evicted tokens | none |", "| storage | float32 |", "seen - position", "the token itself",
        "transformers ", "git ",
    ):  # fmt: skip
        assert told in card.text


def test_the_curve_is_a_table_of_accuracy_by_budget_largest_first(tmp_path):
    measured = {
        "global 2.5%": 0.75,
        "global full": 0.9453,
        "per_head 10%": 0.5,
        "global 10%": 0.8398,
        "per_head 2.5%": 0,
    }
    found = table(card_of(tmp_path / "gates", validation=measured))
    assert list(found) == ["all", "10%", "2.5%"]
    assert found == {"all": ["0.945", "0.945"], "10%": ["0.840", "0.500"], "2.5%": ["0.750", "0.000"]}


STRANGE = {"global": "high", "words": 1.0, "global 5%": "0.5", "global 2%": 10**400, "global 1%": True}


@pytest.mark.parametrize("validation", [None, {}, 3, STRANGE, {"global 5%": float("nan"), "per_head 5%": 1.5}])
def test_without_a_measurement_the_card_says_so(tmp_path, validation):
    assert "Not measured." in card_of(tmp_path / "gates", validation=validation).text
    assert not (tmp_path / "gates" / "accuracy.png").exists()


def test_the_picture_shows_what_was_measured(tmp_path):
    """Lines of the scopes and of the full cache, each in its colour, where their numbers are; the same bytes again."""
    some = {"global full": 0.9, "global 10%": 0.8, "global 5%": 0.7, "per_head 10%": 0.4, "per_head 5%": 0.1}
    card = card_of(tmp_path / "gates", validation=some)
    assert "![Accuracy by budget](accuracy.png)" in card.text
    content = (tmp_path / "gates" / "accuracy.png").read_bytes()
    heights = {}
    for name, colour in {"one pool": (213, 94, 0), "head by head": (0, 114, 178), "full": (51, 51, 51)}.items():
        pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))[80:]  # below the legend
        heights[name] = (pixels == colour).all(-1).nonzero()[0]
        assert len(heights[name]), name
    assert heights["full"].min() < heights["one pool"].min() < heights["head by head"].min()
    again = RetentionGates.from_pretrained(tmp_path / "gates")
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "accuracy.png").read_bytes() == content


def test_a_picture_of_other_gates_does_not_stay(tmp_path):
    card_of(tmp_path / "gates", validation={"global 5%": 0.5})
    assert (tmp_path / "gates" / "accuracy.png").exists()
    assert "accuracy.png" not in card_of(tmp_path / "gates").text
    assert not (tmp_path / "gates" / "accuracy.png").exists()


def test_nothing_gets_out_of_its_cell(tmp_path):
    evil = "x |\n\n## Free | <script>alert(1)</script>"
    card = card_of(tmp_path / "gates", BASE | {"name_or_path": evil}, task=evil, validation={f"global {evil}": 0.5})
    assert "\n## Free" not in card.text
    assert "<script" not in card.text
    assert list(table(card)) == ["x / ## Free / &lt;script>alert(1)&lt;/script>"]
    assert "accuracy.png" not in card.text


def test_a_stranger_s_name_becomes_no_link_and_no_picture(tmp_path):
    card = card_of(tmp_path / "gates", BASE | {"name_or_path": "![x](https://elsewhere.example/seen.png)"})
    assert "](" not in card.text
