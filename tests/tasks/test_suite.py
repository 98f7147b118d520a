"""The tasks beside plain needles: solvable from what they show, split by material, and worth a cache."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.data.example import EvidenceRef, TextRef
from retention.data.render import Renderer
from retention.policies import POLICIES
from retention.tasks import TASKS, scene
from retention.tasks.answering import answer_turns, prefill, read_on
from retention.tasks.diffuse_count import DiffuseCount
from retention.tasks.filler import WHO, filler
from retention.tasks.majority import Majority
from retention.tasks.needles import Needles
from retention.tasks.recall import Recall
from retention.tasks.scene import DIGIT0, GRID, KEY0, key_index
from retention.tasks.text_heavy import TextHeavy

SUITE = {
    "recall": Recall(n_images=3, n_needles=8, n_turns=4, filler_images=2, filler_needles=5),
    "recall_text": Recall(n_images=3, n_needles=8, n_turns=4, filler_images=0, filler_needles=0, filler_words=20),
    "text_heavy": TextHeavy(n_images=2, n_needles=6, n_words=40, n_facts=4, n_turns=4),
    "facts": TextHeavy(n_images=2, n_needles=6, n_words=40, n_facts=4, n_turns=4, ask="text"),
    "both": TextHeavy(n_images=2, n_needles=6, n_words=40, n_facts=4, n_turns=8, ask="both"),
    "majority": Majority(n_images=6, n_keys=3, votes=3, others=2, n_turns=3),
}
every_task = pytest.mark.parametrize("name", SUITE)
BEHIND = 3


def cells_of(monkeypatch, task, index=0, split="train"):
    """An example with the cells of all scenes drawn for it, in order."""
    drawn, paint = [], scene._paint
    monkeypatch.setattr(
        scene, "_paint", lambda rng, cells, *rest: drawn.append(cells.copy()) or paint(rng, cells, *rest)
    )
    return task.example(0, split, index), drawn


def asked(turn):
    colour, letter = turn.question.removeprefix("<ask> ").split("-")
    return KEY0 + key_index(colour, letter)


def same(a, b):
    def shown(example):
        return [x.payload.tobytes() if x.kind == "image" else x.payload for x in [*example.segments, *example.later]]

    return (a.id, a.turns, a.meta, shown(a)) == (b.id, b.turns, b.meta, shown(b))


@every_task
def test_an_example_depends_on_its_seed_split_and_index_only(name):
    task = SUITE[name]
    assert same(task.example(3, "val", 4), [replace(task).example(3, "val", i) for i in range(5)][4])
    for other in (task.example(4, "val", 4), task.example(3, "test", 4), task.example(3, "val", 5)):
        assert other.id != task.example(3, "val", 4).id
        assert not same(other, task.example(3, "val", 4))


@every_task
def test_the_first_turn_alone_is_the_first_of_many(name):
    many, one = (SUITE[name].example(0, "test", 2, n_turns=n) for n in (None, 1))
    assert one.turns == many.turns[:1]
    assert [len(x.segments) for x in (one, many)] == [len(many.segments)] * 2


@pytest.mark.parametrize("repeat", [0.25, 0.5])
def test_a_share_of_the_turns_asks_an_earlier_key_again(repeat):
    task, places = Needles(n_images=4, n_needles=16, n_turns=8, repeat=repeat), set()
    for index in range(12):
        example, plain = (replace(task, repeat=x).example(0, "test", index) for x in (repeat, 0.0))
        asked_of = [turn.question for turn in example.turns]
        again = [i for i, question in enumerate(asked_of) if question in asked_of[:i]]
        fresh = [turn for i, turn in enumerate(example.turns) if i not in again]
        assert len(again) == 8 * repeat
        assert fresh == plain.turns[: len(fresh)]
        assert all(example.turns[i] in fresh for i in again)
        assert example.meta["n_distractors"] == 16 - len(fresh)
        assert example.turns[:3] == task.example(0, "test", index, n_turns=3).turns
        assert (example.images[0] == plain.images[0]).all()
        places |= set(again)
    assert places == set(range(1, 8))


@every_task
def test_every_scene_draws_scans_of_its_split_only(name, monkeypatch):
    used = []
    scans = scene.scans
    monkeypatch.setattr(scene, "scans", lambda split: used.append(split) or scans(split))
    for split in ("train", "val", "test"):
        SUITE[name].example(0, split, 0)
        assert set(used) == {split}
        used.clear()


@pytest.mark.parametrize("style", ["symbolic", "natural"])
def test_no_word_or_subject_of_the_filler_is_in_two_splits(style, embedded_processor):
    rng = np.random.default_rng(0)
    told = {split: filler(rng, split, 400, style) for split in ("train", "val", "test")}
    units = {
        k: {u for u in v if style == "symbolic"} or {w for w in WHO[k] if any(w in u for u in v)}
        for k, v in told.items()
    }
    assert all(len(x) > 3 for x in units.values())
    assert not units["train"] & units["val"] | units["train"] & units["test"] | units["val"] & units["test"]
    words = [word for unit in told["test"] for word in unit.split()]
    assert 400 <= len(words) < 412
    if style == "symbolic":
        ids = embedded_processor.tokenizer.convert_tokens_to_ids(words)
        assert embedded_processor.tokenizer.pad_token_id not in ids


@pytest.mark.parametrize("name", ["recall", "recall_text", "text_heavy"])
def test_needles_are_answered_by_the_digit_right_of_their_only_key(name, monkeypatch):
    example, drawn = cells_of(monkeypatch, SUITE[name])
    for turn in example.turns:
        places = np.argwhere(drawn[0] == asked(turn)).tolist()
        assert len(places) == 1
        image, row, column = places[0]
        assert turn.evidence == [EvidenceRef(image, row, column + i) for i in (0, 1)]
        assert drawn[0][image, row, column + 1] == DIGIT0 + int(turn.answer)


def test_the_second_prompt_has_other_keys_and_is_never_asked_about(monkeypatch):
    example, (context, later) = cells_of(monkeypatch, SUITE["recall"])
    keys = [set(cells[(cells >= KEY0) & (cells < KEY0 + 78)].tolist()) for cells in (context, later)]
    assert [len(x) for x in keys] == [8, 5]
    assert keys[0].isdisjoint(keys[1])
    assert {asked(turn) for turn in example.turns} <= keys[0]
    assert (len(example.images), [s.kind for s in example.later]) == (3, ["image", "image"])
    assert len(SUITE["recall_text"].example(0, "train", 0).later[0].payload.split()) == 20
    assert len(example.whole().segments) == 5
    assert example.whole().later == []


@pytest.mark.parametrize("style", ["symbolic", "natural"])
def test_facts_stand_in_the_text_once_and_answer_their_questions(style):
    example = SUITE["facts"].example(0, "train", 1, style=style)
    pictured = {turn.question for turn in replace(SUITE["facts"], ask="images", n_turns=6).example(0, "train", 1).turns}
    whole = " ".join(x.payload for x in example.segments if x.kind == "text")
    for turn in example.turns:
        ref = turn.evidence[0]
        told = example.segments[ref.segment].payload[ref.start : ref.end]
        assert whole.count(told) == 1
        colour, letter = re.search(r"(red|green|blue)[ -](?:letter )?([A-Z])\b", told).groups()
        assert re.search(rf"{colour}[ -](letter )?{letter}", turn.question)
        assert re.search(r"(\d)\.?$", told)[1] == turn.answer
        assert f"<ask> {colour}-{letter}" not in pictured
    assert len(example.segments) == 4
    kinds = [type(turn.evidence[0]) for turn in SUITE["both"].example(0, "train", 0).turns]
    assert set(kinds) == {EvidenceRef, TextRef}


def test_the_majority_is_the_majority_and_no_other_digit_comes_close(monkeypatch):
    example, (cells,) = cells_of(monkeypatch, SUITE["majority"])
    for turn in example.turns:
        places = np.argwhere(cells == asked(turn)).tolist()
        votes = Counter(int(cells[i, r, c + 1]) - DIGIT0 for i, r, c in places)
        assert sorted(votes.values()) == [1, 1, 3]
        assert votes.most_common(1)[0] == (int(turn.answer), 3)
        assert {(x.image, x.row, x.column) for x in turn.evidence} == {
            (i, r, c + d) for i, r, c in places for d in (0, 1)
        }
    assert example.meta["one_vote"] == 0.6


@every_task
def test_answers_are_spread_over_the_digits(name):
    answers = Counter(turn.answer for i in range(150) for turn in SUITE[name].example(0, "train", i).turns)
    assert set(answers) == set("0123456789")
    assert max(answers.values()) < 0.25 * answers.total()


@every_task
def test_natural_wording_asks_the_same_in_english(name):
    symbolic, natural = (SUITE[name].example(0, "train", 0, style=style) for style in ("symbolic", "natural"))
    for short, long in zip(symbolic.turns, natural.turns, strict=True):
        colour, letter = short.question.removeprefix("<ask> ").split("-")
        assert f"{colour} letter {letter}" in long.question
        assert (short.answer, long.max_new_tokens) == (long.answer, 8)


@every_task
def test_evidence_tokens_decode_to_what_they_are(name, embedded_processor, monkeypatch):
    renderer = Renderer(embedded_processor, [2])
    example, drawn = cells_of(monkeypatch, SUITE[name])
    rendered = renderer.render([example])
    ids, places = rendered.inputs["input_ids"][0], rendered.visual[0].nonzero().flatten().tolist()
    for turn, found in zip(example.turns, rendered.evidence[0], strict=True):
        refs = [ref for ref in turn.evidence if isinstance(ref, TextRef)]
        told = [example.segments[ref.segment].payload[ref.start : ref.end] for ref in refs]
        if told:
            assert " ".join(embedded_processor.tokenizer.convert_ids_to_tokens(ids[found].tolist())) == told[0]
        else:
            cells = {drawn[0].flat[places.index(p)] for p in found}
            assert cells <= {asked(turn), *range(DIGIT0, DIGIT0 + 10)}
            assert len(found) == len(turn.evidence)


def test_the_same_tokens_reach_the_model_in_one_prompt_or_in_two(embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    for name in ("recall", "recall_text"):
        example = SUITE[name].example(0, "test", 0)
        split, whole = renderer.render([example]), renderer.render([example.whole()])
        parts = [split.inputs["input_ids"], split.later["input_ids"]]
        assert torch.equal(torch.cat(parts, 1), whole.inputs["input_ids"])
        if name == "recall":
            pixels = [split.inputs["pixel_values"], split.later["pixel_values"]]
            assert torch.equal(torch.cat(pixels), whole.inputs["pixel_values"])
        batch, turns = renderer.training_batch([example]), renderer.turns(example)
        asked_of = [
            token for pair in zip(turns.questions, turns.answers, strict=True) for part in pair for token in part
        ]
        assert batch.inputs["input_ids"][0].tolist() == whole.inputs["input_ids"][0].tolist() + asked_of
        assert whole.evidence == split.evidence
        assert (whole.later, split.lengths) == (None, [55])


@pytest.mark.parametrize(
    ("task", "changes", "sentence"),
    [
        (Recall, {"filler_images": 0, "filler_needles": 0}, "task.filler_images or filler_words of at least 1"),
        (Recall, {"filler_images": -1}, "task.filler_images and filler_words of 0 or more"),
        (Recall, {"filler_needles": 55}, "task.filler_needles between 0 and 54, got 55"),
        (Recall, {"filler_images": 1}, "task.filler_needles between 0 and 8, got 24"),
        (TextHeavy, {"ask": "sounds"}, "task.ask among images, text, both, got 'sounds'"),
        (TextHeavy, {"n_words": 63}, "task.n_words of at least 64, got 63"),
        (TextHeavy, {"n_facts": 71}, "task.n_facts between 0 and 70, got 71"),
        (TextHeavy, {"n_facts": 4, "ask": "text"}, "task.n_turns between 1 and the 4 askable needles, got 8"),
        (TextHeavy, {"asked_colour": "red", "n_asked": 8}, "task.asked_colour of null for text_heavy, got 'red'"),
        (Majority, {"votes": 1}, "task.votes of at least 2, got 1"),
        (Majority, {"others": 10}, "task.others between 0 and 9, got 10"),
        (Majority, {"n_keys": 0}, "task.n_keys between 1 and 78, got 0"),
        (Majority, {"n_images": 4}, "at most 32 occurrences in 4 images, got 40"),
        (Majority, {"n_turns": 5}, "task.n_turns between 1 and 4, got 5"),
        (Majority, {"cell_px": 7}, "task.cell_px of at least 8, got 7"),
        (TextHeavy, {"repeat": 0.5}, "task.repeat of 0 for text_heavy, got 0.5"),
        (Needles, {"repeat": 1.0}, "task.repeat between 0 and 0.875 with 8 turns, the first of which is new, got 1.0"),
        (Needles, {"repeat": 0.5, "n_turns": 1}, "task.repeat between 0 and 0 with 1 turns"),
    ],
)
def test_tasks_without_meaning_are_refused_with_a_sentence(task, changes, sentence):
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        task(**changes)


def test_cells_grow_with_their_pixels():
    for task in (Majority(cell_px=16), replace(SUITE["recall"], cell_px=16)):
        example = task.example(0, "train", 0)
        images = [*example.images, *(x.payload for x in example.later if x.kind == "image")]
        assert {image.shape for image in images} == {(16 * GRID, 16 * GRID, 3)}


def accuracy(model, renderer, rendered, config=None, keep=None):
    """Mean score under random eviction (nothing evicted without a config), `keep` [batch, tokens] protected."""
    with evicting(model, POLICIES["random" if config else "full"](), config or CacheConfig()) as cache:
        if keep is not None:
            cache.protect(keep)
        prefill(model, cache, rendered, pad=renderer.pad)
        read_on(model, cache, rendered)
        held = int(cache.kept().sum((0, 2)).max())
        said = answer_turns(model, cache, rendered, pad=renderer.pad)
    right = [
        renderer.decode(x) == t.answer
        for e, y in zip(rendered.examples, said, strict=True)
        for t, x in zip(e.turns, y, strict=True)
    ]
    return sum(right) / len(right), held


@pytest.mark.parametrize(
    ("task", "most"),
    [
        (Needles(), 0.5),
        (Recall(n_turns=4), 0.5),
        (Recall(n_turns=4, filler_images=0, filler_needles=0, filler_words=288), 0.5),
        (TextHeavy(), 0.5),
        (TextHeavy(ask="text"), 0.5),
        (Majority(), 0.7),
    ],
    ids=["needles", "recall", "recall_text", "text_heavy", "facts", "majority"],
)
def test_a_keeper_of_what_answers_is_as_good_as_the_full_cache_and_a_random_one_is_not(
    task, most, embedded_model, embedded_processor
):
    """The embedded model answers from the tokens three behind each digit, where its layers have moved it.

    So those of every digit that could be asked about are what a perfect keeper protects.
    """
    renderer, count = Renderer(embedded_processor, [2]), 12
    rendered = renderer.render([task.example(0, "test", i) for i in range(count)])
    everything = replace(
        task,
        n_turns=task.n_keys
        if isinstance(task, Majority)
        else task.n_facts
        if getattr(task, "ask", "") == "text"
        else task.n_needles,
    )
    known = renderer.render([everything.example(0, "test", i) for i in range(count)])
    assert torch.equal(known.inputs["input_ids"], rendered.inputs["input_ids"])
    keep = torch.zeros_like(rendered.inputs["input_ids"], dtype=torch.bool)
    for row, turns in enumerate(known.evidence):
        digits = [p for turn in turns for p in (turn[1::2] if len(turn) == 2 else _digits(known, row, turn))]
        keep[row, [p + BEHIND for p in digits if p + BEHIND < keep.shape[1]]] = True
    budget = CacheConfig(budget=Budget(float(keep.sum(1).max()) + 1))
    whole, seen = accuracy(embedded_model, renderer, rendered)
    kept, held = accuracy(embedded_model, renderer, rendered, budget, keep)
    blind, _ = accuracy(embedded_model, renderer, rendered, budget)
    assert whole > 0.85
    assert held < 0.25 * seen
    assert kept > whole - 0.1
    assert blind < most


def _digits(rendered, row, tokens):
    """Of a turn's many cells, those that are right of another: the votes beside a key."""
    refs = sorted({(x.image, x.row, x.column) for t in rendered.examples[row].turns for x in t.evidence})
    places = rendered.visual[row].nonzero().flatten().tolist()
    cells = {p: divmod(places.index(p), 16) for p in tokens}
    grouped = {p: (image, *divmod(cell, GRID)) for p, (image, cell) in cells.items()}
    assert set(grouped.values()) <= set(refs)
    return [p for p in sorted(tokens) if p - 1 in grouped and sorted(tokens).index(p) % 2]


def test_the_embedded_model_cannot_count(embedded_model, embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    rendered = renderer.render([DiffuseCount().example(0, "test", i) for i in range(48)])
    assert accuracy(embedded_model, renderer, rendered)[0] < 0.3


def test_the_second_prompt_is_evicted_too(embedded_model, embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    rendered = renderer.render([SUITE["recall"].example(0, "test", i) for i in range(2)])
    with evicting(embedded_model, POLICIES["streaming_llm"](), CacheConfig(budget=Budget(0.2, "fraction"))) as cache:
        prefill(embedded_model, cache, rendered)
        assert (cache.kept() == 11).all()
        read_on(embedded_model, cache, rendered)
        assert (cache.seen() == 55 + 36).all()
        assert (cache.kept() == 18).all()


def test_tasks_are_registered():
    assert {type(task) for task in SUITE.values()} | {Needles} <= set(TASKS.values())
    assert all(TASKS[task.name].chance == 0.1 for task in SUITE.values())
    assert all(TASKS[name].name == name for name in TASKS)
