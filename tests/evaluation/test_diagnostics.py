"""What pictures and examples are drawn from: counted right, written and read back, shown in place."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.data.example import Example, Segment, TextRef, Turn
from retention.data.render import Renderer
from retention.evaluation.browser import EDGE, LONGEST, browse, pieces
from retention.evaluation.diagnostics import PLACES, lives, shown_contexts, survival
from retention.evaluation.kept_images import kept_images, picked, veiled
from retention.evaluation.looks import BINS, Look, Shown, load_lives, load_looks, load_shown, save_shown
from retention.evaluation.maps import entries, half_life_histogram, place_curve, shares, shares_by_kind
from retention.gates import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.models import family_of
from retention.policies import POLICIES
from retention.tasks.answering import prefill
from retention.tasks.needles import Needles


@pytest.fixture(scope="module")
def renderer(embedded_model, embedded_processor):
    return Renderer(embedded_processor, family_of(embedded_model).visual_ids(embedded_model.config))


@pytest.fixture(scope="module")
def batch(renderer):
    task = Needles(n_images=3, n_needles=6, n_turns=2)
    return renderer.render([task.example(0, "test", i) for i in range(3)])


@pytest.fixture(scope="module")
def cache(embedded_model, batch):
    with evicting(embedded_model, POLICIES["streaming_llm"](), CacheConfig(Budget.parse("20"), sink_size=2)) as cache:
        prefill(embedded_model, cache, batch)
    return cache


@pytest.fixture(scope="module")
def look(cache, batch):
    kept, seen, held = survival(cache, batch)
    return Look("needles", "streaming_llm", "per_head", "p", "20", kept, seen, held, len(batch.lengths))


def test_counts_are_those_of_the_cache(cache, batch, look):
    assert look.kept.sum() == int(cache.kept().sum())
    assert look.kept.shape == (*cache.kept().shape[::2], PLACES, 2)
    assert look.seen.sum() == sum(batch.lengths)
    assert look.seen.sum(0)[1] == int(batch.visual.sum())
    assert (look.kept <= look.seen).all()
    assert [len(held) for held in look.held] == batch.lengths[:2]
    assert (look.held[0] == cache.kept_table()[:, 0].sum((0, 1)).numpy()[: batch.lengths[0]]).all()
    assert look.held[0][:2].tolist() == [look.cells, look.cells]
    assert look.kept[..., 0, :].sum() > 0 == look.kept[..., 2, :].sum()


def test_looks_contexts_and_lives_come_back(look, batch, embedded_model, renderer, tmp_path):
    contexts = shown_contexts(embedded_model, renderer.tokenizer, batch)
    look.save(tmp_path)
    save_shown(tmp_path, "needles", contexts)
    (read,) = load_looks(tmp_path, "needles")
    assert (read.policy, read.budget, read.scope, read.protocol) == ("streaming_llm", "20", "per_head", "p")
    assert np.array_equal(read.kept, look.kept)
    assert read.contexts == 3
    assert all(map(np.array_equal, read.held, look.held))
    first, back = contexts[0], load_shown(tmp_path, "needles")[0]
    assert (back.id, back.tokens, back.turns) == (first.id, first.tokens, first.turns)
    assert np.array_equal(back.places, first.places)
    assert all(map(np.array_equal, back.images, first.images))
    assert load_looks(tmp_path, "other") == load_shown(tmp_path, "other") == []
    assert load_lives(tmp_path, "needles") is None


def test_evidence_lies_on_the_cells_that_are_asked(batch, embedded_model, renderer):
    context, example = shown_contexts(embedded_model, renderer.tokenizer, batch)[0], batch.examples[0]
    asked = {(ref.image, ref.row, ref.column) for turn in example.turns for ref in turn.evidence}
    side = context.grid(0)[0] // example.meta["grid"]
    assert {(i, r // side, c // side) for i, r, c in context.places[context.evidence()].tolist()} == asked
    numbers = np.arange(len(context.tokens))
    laid = context.laid(numbers, 1)
    assert laid.shape == context.grid(1)
    assert (np.diff(laid.ravel()) > 0).all()


def test_half_lives_are_counted_by_power_of_two(batch, embedded_model, tmp_path):
    torch.manual_seed(0)
    gates = RetentionGates.for_model(DBTrim(init_half_life=100.0), embedded_model)
    found = lives("needles", embedded_model, batch, gates)
    assert found.counts.shape[-1] == BINS
    per_head = found.counts.sum((2, 3))
    assert (per_head == sum(batch.lengths)).all()
    assert found.counts[:, :, 1].sum((0, 1)).argmax() in (5, 6, 7)  # 64 to 128, give or take what the gates start with
    found.save(tmp_path)
    assert np.array_equal(load_lives(tmp_path, "needles").counts, found.counts)
    assert half_life_histogram(found, tmp_path / "h.png").stat().st_size > 5000


def test_pictures_are_drawn_from_looks_alone(look, batch, embedded_model, renderer, tmp_path):
    (context, _) = shown_contexts(embedded_model, renderer.tokenizer, batch)
    assert shares([look])["streaming_llm"].mean() == pytest.approx(look.kept.sum() / look.seen.sum() / look.cells)
    assert (entries([look])["streaming_llm"] == 20).all()
    assert entries([replace(look, contexts=None)]) == {}
    assert set(shares_by_kind([look])) == {"streaming_llm, text", "streaming_llm, image"}
    assert place_curve([look], tmp_path / "p.png").stat().st_size > 5000
    drawn = kept_images(context, [look], tmp_path / "k.png")
    lines = drawn.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 1 + int(context.visual.sum())
    kept = sum(int(line.split(",")[5]) for line in lines[1:])
    assert kept == int(look.held[0][context.visual].sum())
    assert picked(context) == [0, 1, 2]
    with pytest.raises(ValueError, match="places are known"):
        kept_images(Shown("x", ["a"], np.zeros(1, bool), None, [], []), [look], tmp_path / "n.png")


def test_veils_hide_what_nobody_holds():
    image = np.full((4, 4, 3), 200, np.uint8)
    seen = veiled(image, np.array([[0.0, 1.0]]))
    assert (seen[:, 2:] == 200).all()
    assert (seen[:, :2] < 80).all()


def test_the_browser_tells_answers_and_what_was_kept(look, batch, embedded_model, renderer):
    contexts = shown_contexts(embedded_model, renderer.tokenizer, batch)
    rows = [
        {"task": "needles", "protocol": "p", "policy": policy, "scope": "per_head", "example_id": contexts[0].id, "turn": turn,
         "seed_train": None, "prediction": f"{policy}{turn}", "score": 1.0, "budget": {"requested": budget}}
        for policy, budget in (("streaming_llm", "20"), ("full", "100%")) for turn in range(2)
    ]  # fmt: skip
    first, second = browse("needles", contexts, rows, [look], "p")
    (part,) = first["budgets"]
    assert [line["policy"] for line in part["answers"]] == ["full cache", "streaming_llm"]
    assert part["answers"][1]["cells"][1]["said"] == "streaming_llm1"
    assert part["kept"][0]["share"] == pytest.approx(20 / len(contexts[0].tokens), rel=0.01)
    assert len(part["kept"][0]["masks"]) == len(first["images"]) == 3
    assert sum(len(image["marks"]) for image in first["images"]) == first["evidence"] == len(contexts[0].evidence())
    assert second["budgets"][0]["answers"] == []


def text(tokens, evidence=()):
    words = [f" w{i}" for i in range(tokens)]
    return Shown(
        "x", words, np.zeros(tokens, bool), None, [], [{"question": "?", "answer": "!", "evidence": list(evidence)}]
    )


def test_stretches_join_tokens_that_look_alike():
    found = list(pieces(text(6, (2, 3)), np.array([0.0, 0.0, 0.0, 1.0, 1.0, 0.01])))
    assert [(p["text"], p["marked"], p["level"]) for p in found] == [
        (" w0 w1", False, 0), (" w2", True, 0), (" w3", True, 4), (" w4", False, 4), (" w5", False, 1),
    ]  # fmt: skip


def test_long_texts_are_cut_but_never_where_evidence_is():
    length = 2 * LONGEST
    found = list(pieces(text(length, (LONGEST,))))
    shown = "".join(p["text"] for p in found if p["kind"] == "text").split()
    hidden = sum(p["tokens"] for p in found if p["kind"] == "gap")
    assert len(shown) + hidden == length
    assert shown[:EDGE] == [f"w{i}" for i in range(EDGE)]
    assert [p["text"] for p in found if p.get("marked")] == [f" w{LONGEST}"]


def test_tokens_of_a_text_read_as_the_text(embedded_model, renderer):
    words = "<bos> red A blue B"
    example = Example("t", [Segment("text", words)], [Turn("x", "1", [TextRef(0, 6, 11)])], "after")
    (shown,) = shown_contexts(embedded_model, renderer.tokenizer, renderer.render([example]))
    assert shown.places is None
    assert all(token.startswith(" ") for token in shown.tokens)
