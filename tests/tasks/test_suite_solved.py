"""Every procedural task: its evidence answers it, a random share of the context does not, and no answer is likelier."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from retention.data.example import EvidenceRef
from retention.tasks import TASKS
from retention.tasks.count_list import CountList
from retention.tasks.deferred_region import DeferredRegion
from retention.tasks.diffuse_count import DiffuseCount
from retention.tasks.dilution import Dilution
from retention.tasks.doc_pages import DocPages
from retention.tasks.haystack_any_all import HaystackAnyAll
from retention.tasks.jigsaw import Jigsaw
from retention.tasks.long_trace import LongTrace
from retention.tasks.majority import Majority
from retention.tasks.multi_query import MultiQuery
from retention.tasks.needle import Needle
from retention.tasks.needles import Needles
from retention.tasks.procedural import Procedural
from retention.tasks.recall import Recall
from retention.tasks.ruler.task import KINDS, Ruler
from retention.tasks.scorers import SCORERS
from retention.tasks.state_change import CHANCE, StateChange
from retention.tasks.stream_video import StreamVideo
from retention.tasks.text_heavy import TextHeavy
from retention.tasks.three_statements import ThreeStatements
from retention.tasks.tile_index import TileIndex
from retention.tasks.tpr_stress import TprStress
from tests.tasks.seen import Recorder, named, seen, units
from tests.tasks.solvers import SOLVERS

OLDER = {
    "needles": Needles(),
    "recall": Recall(),
    "text_heavy": TextHeavy(ask="both"),
    "majority": Majority(),
}
NEWER: dict[str, Procedural] = {
    **{f"needle_{kind}": Needle(kind=kind, n_words=32) for kind in ("text", "image", "index", "match")},
    "diffuse_count": DiffuseCount(),
    "diffuse_count_colour": DiffuseCount(attribute="colour"),
    "diffuse_count_letter": DiffuseCount(attribute="letter", n_images=8),
    "deferred_region": DeferredRegion(),
    "deferred_region_b_first": DeferredRegion(b_first=True),
    "multi_query": MultiQuery(),
    "count_list": CountList(),
    "count_list_image": CountList(shown="image"),
    "containment": ThreeStatements(),
    "containment_image": ThreeStatements(shown="image"),
    "ordering": ThreeStatements(kind="ordering"),
    "jigsaw": Jigsaw(),
    **{kind: StateChange(kind=kind) for kind in CHANCE},
    "last_state_inside": StateChange(at_end=False),
    "doc_pages": DocPages(),
    "doc_pages_2": DocPages(hops=2),
    "tile_index": TileIndex(),
    "tile_index_list": TileIndex(n_targets=3),
    "haystack_single": HaystackAnyAll(),
    "haystack_multi": HaystackAnyAll(kind="multi"),
    "haystack_anchors": HaystackAnyAll(kind="multi", only_anchors=True),
    "dilution": Dilution(),
    "dilution_ties": Dilution(n_blank=0, n_ties=8),
    "dilution_position": Dilution(n_blank=0, stretch=3.0),
    "tpr_stress": TprStress(),
    "stream_video": StreamVideo(),
    "stream_video_pan": StreamVideo(pan=True),
    **{f"long_trace_{kind}": LongTrace(kind=kind, n_steps=12, n_items=16) for kind in ("walk", "sum", "count")},
    **{f"ruler_{kind}": Ruler(kind=kind, n_tokens=600) for kind in KINDS},
}
TASK = OLDER | NEWER
every_task = pytest.mark.parametrize("name", TASK)
every_new_task = pytest.mark.parametrize("name", NEWER)
COUNT, BUDGET = 16, {"ruler_fwe": 0.02}
"""Contexts per task, and the share of each that is kept where it is not a tenth: frequent words are everywhere."""
FREE = ("ruler", "long_trace", "count_list", "doc_pages")
"""Tasks whose answers are too many to be guessed."""
REFUSED = {("deferred_turn", "existence"), ("deferred_turn", "needle_match"), ("before", "needle_match")}
"""Places of a question that a variant of a task does not let it stand at."""


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def score(task, turn, view):
    said = SOLVERS[task.name](turn.question, view)
    return SCORERS[turn.scorer](said or "", turn.answer, turn.choices)


def scored(example):
    return [turn for turn in example.turns if turn.scored]


def test_every_procedural_task_is_here():
    made = {name for name, task in TASKS.items() if not task.__module__.startswith("retention.tasks.benchmarks")}
    assert {task.name for task in TASK.values()} == made == set(SOLVERS)


@every_task
def test_evidence_alone_answers_and_a_random_tenth_of_the_context_does_not(name, recorder):
    task, perfect, blind, missing = TASK[name], [], [], []
    for index in range(COUNT):
        example, words = recorder.example(task, index)
        every, rng = units(example, words), np.random.default_rng(index)
        kept = [every[i] for i in rng.permutation(len(every))[: round(BUDGET.get(name, 0.1) * len(every))]]
        for turn in scored(example):
            evidence = [named(ref) for ref in turn.evidence]
            perfect.append(score(task, turn, seen(example, words, evidence)))
            blind.append(score(task, turn, seen(example, words, kept)))
            if turn.needs_all and index < 6:
                for i in range(min(8, len(evidence))):
                    missing.append(score(task, turn, seen(example, words, evidence[:i] + evidence[i + 1 :])))
    assert min(perfect) == 1
    assert np.mean(blind) < 0.6
    assert max(missing, default=0) < 1


@pytest.mark.parametrize("name", [name for name in TASK if not name.startswith(FREE)])
def test_a_question_alone_does_not_say_its_answer(name, recorder):
    answers: Counter[str] = Counter()
    for index in range(120):
        example, _ = recorder.example(TASK[name], index)
        answers.update(turn.answer for turn in scored(example))
    guess, total = example.meta["chance"], answers.total()
    assert max(answers.values()) / total <= guess + 4 * (guess * (1 - guess) / total) ** 0.5


def test_a_count_is_the_number_of_its_cells_among_near_misses(recorder):
    for attribute, axes in (("both", (0, 1)), ("colour", (0,)), ("letter", (1,))):
        counts = Counter()
        for index in range(60):
            example, words = recorder.example(DiffuseCount(n_images=4, n_distractors=8, attribute=attribute), index)
            (turn,) = example.turns
            letters = {place: words[place].split("-") for place in np.ndindex(*words.shape) if "-" in words[place]}
            counted = [letters[ref.image, ref.row, ref.column] for ref in turn.evidence]
            others = [word for place, word in letters.items() if EvidenceRef(*place) not in turn.evidence]
            assert turn.answer == str(len(counted))
            assert len({tuple(word[axis] for axis in axes) for word in counted}) <= 1
            assert len(others) == 8
            for target in counted[:1]:
                shared = Counter(tuple(a == b for a, b in zip(word, target, strict=True)) for word in others)
                if attribute == "both":
                    assert shared == {(True, False): 4, (False, True): 4}
                assert all(not all(told[axis] for axis in axes) for told in shared)
            counts[turn.answer] += 1
        assert len(counts) > 7


def same(a, b):
    def shown(example):
        return [x.payload if x.kind == "text" else x.payload.tobytes() for x in example.segments]

    return (a.id, a.turns, a.meta, shown(a)) == (b.id, b.turns, b.meta, shown(b))


@every_new_task
def test_an_example_depends_on_seed_split_and_index_only(name):
    task = NEWER[name]
    one = task.example(3, "val", 4, style="natural")
    assert same(one, [replace(task).example(3, "val", i, style="natural") for i in (2, 4)][1])
    for other in ((4, "val", 4), (3, "test", 4), (3, "val", 5)):
        assert not same(one, task.example(*other, style="natural"))
    assert one.id.startswith(f"{task.name}/v{task.version}-")
    assert one.id.endswith("/val/3/4")
    assert one.meta["version"] == task.version
    assert all(0 <= depth <= 1 for turn in one.meta["depth"] for depth in turn)
    assert [len(turn) for turn in one.meta["depth"]] == [len(turn.evidence) for turn in one.turns]


@pytest.mark.parametrize("name", OLDER)
def test_older_tasks_tell_how_deep_their_evidence_lies_and_what_distracts(name, recorder):
    example, _ = recorder.example(OLDER[name], 0)
    depths = example.meta["depth"]
    assert [len(turn) for turn in depths] == [len(turn.evidence) for turn in example.turns]
    for turn, told in zip(example.turns, depths, strict=True):
        places = [ref.image / (example.meta["n_images"] - 1) for ref in turn.evidence if isinstance(ref, EvidenceRef)]
        assert all(0 <= depth <= 1 for depth in told)
        assert not places or told == pytest.approx(places, abs=1e-4)
    assert example.meta["n_distractors"] >= 0


@every_new_task
def test_a_question_stands_wherever_its_task_lets_it(name, recorder):
    task = NEWER[name]
    for position in ("before", "after", "deferred_turn"):
        changes = {"query_position": position} | ({"n_turns": 1} if hasattr(task, "n_turns") else {})
        if position not in task.positions or (position, name) in REFUSED:
            with pytest.raises(ValueError, match=r"expected task\.query_position"):
                replace(task, **changes)
            continue
        placed = replace(task, **changes)
        example, words = recorder.example(placed, 0)
        assert example.query_position == position
        assert [turn.scored for turn in example.turns].count(True) == 1 or task.independent
        if position == "deferred_turn":
            told = [{named(ref) for ref in turn.evidence} for turn in example.turns]
            assert told[0].isdisjoint(told[1])
            for turn in example.turns:
                assert score(task, turn, seen(example, words, [named(ref) for ref in turn.evidence])) == 1
        else:
            assert len(example.turns) == 1


PAINTED = [name for name, task in NEWER.items() if "rendered" in task.tiers]


@pytest.mark.parametrize("name", PAINTED)
def test_words_and_pictures_of_an_example_show_the_same(name, recorder):
    """The symbolic tier writes each cell of the rendered one as a word, and evidence names the same cells."""
    painted, words = recorder.example(replace(NEWER[name], tier="rendered"), 1)
    written, nothing = recorder.example(replace(NEWER[name], tier="symbolic"), 1)
    assert (len(nothing), written.images) == (0, [])
    assert len(painted.images) + sum(segment.kind == "image" for segment in painted.later) == len(words)
    for here, there in zip(painted.turns, written.turns, strict=True):
        assert (here.question, here.answer) == (there.question, there.answer)
        for cell, span in zip(here.evidence, there.evidence, strict=True):
            if isinstance(cell, EvidenceRef):
                text = written.segments[span.segment].payload[span.start : span.end]
                assert text == (words[cell.image, cell.row, cell.column] or ".")


@pytest.mark.parametrize("name", PAINTED)
def test_the_hard_tier_adds_decoys_and_texture(name):
    plain, hard = (
        replace(NEWER[name], tier=tier).example(0, "test", 0, style="natural") for tier in ("rendered", "hard")
    )
    if not plain.images:
        return
    grounds = [np.unique(example.images[0].reshape(-1, 3), axis=0).shape[0] for example in (plain, hard)]
    assert grounds[0] < grounds[1]


@pytest.mark.parametrize("name", PAINTED)
def test_pictures_are_drawn_from_scans_of_their_split(name, monkeypatch):
    from retention.tasks import boards

    used, scans = set(), boards.scans
    monkeypatch.setattr(boards, "scans", lambda split: used.add(split) or scans(split))
    for split in ("train", "val"):
        used.clear()
        NEWER[name].example(0, split, 0, style="natural")
        assert used <= {split}
