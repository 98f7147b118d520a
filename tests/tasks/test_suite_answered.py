"""The procedural tasks that the embedded model can answer, with caches that keep everything, the evidence, or anything."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.config import compose
from retention.data.render import Renderer
from retention.evaluation.run import run
from retention.policies import POLICIES
from retention.tasks.answering import answer_turns, prefill
from retention.tasks.count_list import CountList
from retention.tasks.deferred_region import DeferredRegion
from retention.tasks.diffuse_count import DiffuseCount
from retention.tasks.dilution import Dilution
from retention.tasks.doc_pages import DocPages
from retention.tasks.haystack_any_all import HaystackAnyAll
from retention.tasks.jigsaw import Jigsaw
from retention.tasks.long_trace import LongTrace
from retention.tasks.multi_query import MultiQuery
from retention.tasks.names import ONSETS, coined, number
from retention.tasks.needle import Needle
from retention.tasks.ruler.task import Ruler
from retention.tasks.scorers import SCORERS
from retention.tasks.state_change import StateChange
from retention.tasks.stream_video import StreamVideo
from retention.tasks.three_statements import ThreeStatements
from retention.tasks.tile_index import TileIndex
from retention.tasks.tpr_stress import TprStress
from tests.tasks.test_suite import BEHIND, accuracy

CONTEXTS = 16
ANSWERED = {
    "needle_image": Needle(),
    "needle_text": Needle(kind="text", n_images=4, n_words=96, n_distractor_keys=6),
    "needle_words": Needle(n_images=6, tier="symbolic"),
    "deferred_region": DeferredRegion(n_words=16),
    "multi_query": MultiQuery(n_turns=6),
    "dilution": Dilution(n_blank=4, n_turns=6),
    "dilution_ties": Dilution(n_blank=0, n_ties=4, n_turns=6),
    "tpr_stress": TprStress(n_turns=6),
    "stream_video": StreamVideo(),
    "ruler": Ruler(kind="niah_multikey_2", n_tokens=140),
}


def report(embedded_model, embedded_processor, task):
    renderer = Renderer(embedded_processor, [2])
    rendered = renderer.render([task.measured(renderer.length).example(0, "test", i) for i in range(CONTEXTS)])
    keep = torch.zeros_like(rendered.inputs["input_ids"], dtype=torch.bool)
    pads = [keep.shape[1] - length for length in rendered.lengths]
    for row, turns in enumerate(rendered.evidence):
        digits = {p for turn in turns for p in turn[1::2]}
        wanted = {p + shift for p in digits for shift in (0, 1, 2, BEHIND) if p + shift < rendered.lengths[row]}
        keep[row, [pads[row] + p for p in wanted]] = True
    budget = CacheConfig(budget=Budget(float(keep.sum(1).max()) + 1))
    whole, seen = accuracy(embedded_model, renderer, rendered)
    kept, held = accuracy(embedded_model, renderer, rendered, budget, keep)
    blind, _ = accuracy(embedded_model, renderer, rendered, budget)
    return whole, seen, kept, held, blind


@pytest.mark.parametrize("name", ANSWERED)
def test_a_keeper_of_the_evidence_is_as_good_as_the_full_cache_and_a_random_one_is_not(
    name, embedded_model, embedded_processor
):
    whole, seen, kept, held, blind = report(embedded_model, embedded_processor, ANSWERED[name])
    assert whole > 0.8
    assert held < 0.4 * seen
    assert kept > whole - 0.1
    assert blind < kept - 0.2


def test_independent_questions_see_nothing_of_one_another(embedded_model, embedded_processor):
    """The same question is answered the same whichever comes before it."""
    renderer = Renderer(embedded_processor, [2])
    example = MultiQuery(n_turns=5).example(0, "test", 0)
    assert (example.independent, example.query_position) == (True, "after")
    said = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        turned = renderer.render([replace(example, turns=[example.turns[i] for i in order])])
        with evicting(embedded_model, POLICIES["knorm"](), CacheConfig(Budget(40.0))) as cache:
            prefill(embedded_model, cache, turned, pad=renderer.pad)
            answers = answer_turns(embedded_model, cache, turned, pad=renderer.pad)[0]
            assert (cache.kept() == 40).all()
        said.append([answers[order.index(i)] for i in range(5)])
    assert said[0] == said[1]


def test_the_same_region_is_scored_whichever_is_asked_about_first():
    task = DeferredRegion(n_words=4)
    first, second = (replace(task, b_first=b_first).example(0, "test", 3) for b_first in (True, False))
    assert [turn.scored for turn in first.turns] == [True, False]
    assert [turn.scored for turn in second.turns] == [False, True]
    assert first.turns[0].evidence == second.turns[1].evidence
    assert first.turns[0].answer == second.turns[1].answer
    assert second.turns[1].question.endswith(first.turns[0].question)
    assert all((a == b).all() for a, b in zip(first.images, second.images, strict=True))


@pytest.mark.parametrize(
    ("task", "changes", "sentence"),
    [
        (Needle, {"tier": "easy"}, "task.tier among symbolic, rendered, hard for needle, got 'easy'"),
        (Needle, {"query_position": "last"}, "task.query_position among before, after, deferred_turn for needle"),
        (Needle, {"cell_px": 7}, "task.cell_px of at least 8, got 7"),
        (Needle, {"kind": "sound"}, "task.kind among text, image, index, match, got 'sound'"),
        (Needle, {"kind": "index", "depth": 0.5}, "task.depth of null for kind index"),
        (Needle, {"depth": 1.5}, "task.depth between 0 and 1, got 1.5"),
        (MultiQuery, {"query_position": "before"}, "task.query_position among after for multi_query"),
        (MultiQuery, {"n_needles": 79}, "task.n_needles between 1 and 78, got 79"),
        (Dilution, {"n_turns": 25}, "task.n_turns between 1 and 24, got 25"),
        (Dilution, {"query_position": "before"}, "task.n_turns of 1 with task.query_position before, got 8"),
        (Dilution, {"n_ties": 12}, "needles and ties of a board in at most 16 cells, got 18"),
        (Needle, {"kind": "match", "n_images": 27}, "task.n_images between 2 and 26, got 27"),
        (Needle, {"n_images": 1}, "task.n_images of at least 2, got 1"),
        (Needle, {"kind": "match", "query_position": "before"}, "task.query_position among after for kind match"),
        (TprStress, {"text_to_budget": -0.5}, "task.text_to_budget of 0 or more, got -0.5"),
        (TprStress, {"text_to_budget": 1.0, "budget": 0}, "task.budget of at least 1, got 0"),
        (StreamVideo, {"asked_at": 0.5}, "task.query_position before with task.asked_at above 0, got 'after'"),
        (StreamVideo, {"asked_at": -0.5, "n_turns": 1}, "task.asked_at of 0 or more, below 1, got -0.5"),
        (TprStress, {"n_words": -1}, "task.n_words of 0 or more, got -1"),
        (StreamVideo, {"n_events": 25}, "task.n_events between 1 and 24, got 25"),
        (StreamVideo, {"redundancy": 2.0}, "task.redundancy between 0 and 1, got 2.0"),
        (DeferredRegion, {"query_position": "after"}, "task.query_position among deferred_turn for deferred_region"),
        (DeferredRegion, {"n_images": 5}, "task.n_images between 1 and 4, got 5"),
        (CountList, {"shown": "sound"}, "task.shown of text or image, got 'sound'"),
        (ThreeStatements, {"kind": "ordering", "shown": "image"}, "task.shown of text for ordering, got 'image'"),
        (StateChange, {"kind": "age"}, "task.kind among last_state, shuffle, direction, existence, got 'age'"),
        (StateChange, {"n_changes": 16}, "task.n_changes between 1 and 15, got 16"),
        (StateChange, {"kind": "existence", "query_position": "deferred_turn"}, "before or after for existence"),
        (DocPages, {"n_rows": 7}, "task.n_rows between 1 and 6, got 7"),
        (DocPages, {"n_turns": 4, "hops": 2}, "task.n_pages of at least 8, got 6"),
        (TileIndex, {"n_images": 60}, "between 4 and 200 tiles in a context, got 240"),
        (TileIndex, {"n_targets": 9}, "task.n_targets between 1 and 8, got 9"),
        (Dilution, {"stretch": 0.0}, "task.stretch above 0, got 0.0"),
        (DiffuseCount, {"attribute": "size"}, "task.attribute among both, colour, letter, got 'size'"),
        (DiffuseCount, {"n_images": 1}, "task.n_images of at least 2, got 1"),
        (DiffuseCount, {"n_distractors": 200}, "task.n_distractors between 0 and 119, got 200"),
        (HaystackAnyAll, {"kind": "multi", "n_images": 2}, "task.n_images of at least 3, got 2"),
        (LongTrace, {"tier": "hard"}, "task.tier among symbolic for long_trace, got 'hard'"),
        (LongTrace, {"n_steps": 0}, "task.n_steps of at least 1, got 0"),
        (Ruler, {"kind": "niah"}, "task.kind among niah_single_1, .*, qa_2, got 'niah'"),
        (Ruler, {"n_tokens": 10}, "task.n_tokens of at least 64, got 10"),
    ],
)
def test_tasks_without_meaning_are_refused_with_a_sentence(task, changes, sentence):
    with pytest.raises(ValueError, match=f"expected .*{sentence}"):
        task(**changes)


@pytest.mark.parametrize(
    "task",
    [
        CountList(),
        DiffuseCount(attribute="colour"),
        ThreeStatements(),
        Jigsaw(),
        StateChange(),
        DocPages(),
        TileIndex(),
        HaystackAnyAll(),
        LongTrace(),
        Needle(kind="index"),
        Ruler(kind="vt"),
    ],
    ids=lambda task: task.name,
)
def test_what_the_embedded_model_has_no_words_for_is_refused_with_a_sentence(task):
    with pytest.raises(ValueError, match=r"expected model\.prompt_style natural for"):
        task.example(0, "test", 0)


def test_a_length_too_short_for_its_needles_is_refused():
    with pytest.raises(ValueError, match=r"expected task\.n_tokens of at least \d+ for ruler's cwe, got 200"):
        Ruler(kind="cwe", n_tokens=200).example(0, "test", 0, style="natural")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_names_and_numbers_of_splits_have_nothing_in_common(split):
    rng = np.random.default_rng(0)
    own = {word[0] for word in coined(rng, split, 300)}
    assert own == set(ONSETS[split])
    assert all(own.isdisjoint(letters) for other, letters in ONSETS.items() if other != split)
    rests = {int(number(rng, split, 7)) % 3 for _ in range(50)}
    assert rests == {("train", "val", "test").index(split)}
    assert {len(number(rng, split, 5)) for _ in range(50)} == {5}


def test_steps_are_scored_up_to_the_first_error():
    score = SCORERS["steps"]
    assert [score(said, "a b c d") for said in ("a b c d", "a, b, x, d", "b c d", "", "a b c d e")] == [1, 0.5, 0, 0, 1]


@pytest.mark.usefixtures("unrendered")
def test_an_evaluation_runs_single_independent_deferred_and_measured_tasks(tmp_path):
    """And leaves warm-up turns out of its summary, which stay in the rows."""
    tasks = {"needle": 1, "multi_query": 16, "deferred_region": 1, "ruler": 1}
    small = ["task.ruler.n_tokens=140", "examples=2", "batch_size=2", f"output_dir={tmp_path}"]
    chosen = ["gates=null", "policies=[random]", "budgets=[10%]", f"tasks=[{','.join(tasks)}]"]
    config = compose("eval", [*chosen, *small])
    found = run(config)
    assert {row["task"]: row["n"] for row in found.summary if row["policy"] == "full"} == {
        name: 2 * turns for name, turns in tasks.items()
    }
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    deferred = [row for row in rows if row["task"] == "deferred_region"]
    assert {(row["turn"], row["scored"]) for row in deferred} == {(0, False), (1, True)}
    assert all(row["evidence_recall"]["any"] is not None for row in rows)
