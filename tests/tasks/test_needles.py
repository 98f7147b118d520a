"""Keyed needles: reproducible, solvable from the picture alone, split by scans, fair in their answers."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from retention.data.render import Renderer
from retention.embedded import DECOYS, LETTERS, SPLIT_SIZES, glyphs, scans
from retention.tasks import TASKS, scene
from retention.tasks.needles import Needles
from retention.tasks.scene import COLOURS, DECOY0, DIGIT0, GRID, KEY0, N_KEYS, draw_scene, key_index

SMALL = Needles(n_images=3, n_needles=9, n_turns=5)
SUBSET = Needles(n_images=4, n_needles=16, asked_colour="red", n_asked=6, n_turns=4)
DENSE = Needles(n_images=2, n_needles=16, n_turns=16)
PRESETS = {"small": SMALL, "subset": SUBSET, "dense": DENSE, "default": Needles()}
every_preset = pytest.mark.parametrize("preset", PRESETS)


def scene_of(task, index, seed=0, split="train"):
    """The scene behind an example, drawn again from the example's own randomness."""
    rng = task.rng(seed, split, index)
    return draw_scene(rng, task._keys(rng), n_images=task.n_images, split=split)


def solve(cells, question):
    """Answer a symbolic question from the cells alone: (image, row, column) of the key and the digit beside it."""
    colour, letter = question.removeprefix("<ask> ").split("-")
    places = np.argwhere(cells == KEY0 + key_index(colour, letter))
    assert len(places) == 1
    image, row, column = places[0].tolist()
    return (image, row, column), int(cells[image, row, column + 1]) - DIGIT0


def same(a, b):
    return (
        (a.id, a.turns, a.meta) == (b.id, b.turns, b.meta)
        and len(a.images) == len(b.images)
        and all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    )


@every_preset
def test_an_example_depends_on_its_seed_split_and_index_only(preset):
    task = PRESETS[preset]
    alone = task.example(3, "val", 4)
    in_line = [type(task)(**vars(task)).example(3, "val", i) for i in range(5)]
    assert same(in_line[4], alone)
    assert same(task.example(3, "val", 4), alone)


def test_other_seeds_splits_and_indices_give_other_examples():
    base = SMALL.example(0, "train", 0)
    for other in (SMALL.example(1, "train", 0), SMALL.example(0, "test", 0), SMALL.example(0, "train", 1)):
        assert other.id != base.id
        assert not np.array_equal(other.images[0], base.images[0])


def test_ids_are_unique_over_presets_splits_seeds_and_indices():
    ids = [
        task.example(seed, split, index).id
        for task in (SMALL, SUBSET, DENSE)
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert len(set(ids)) == len(ids)


def test_the_splits_partition_the_scans_of_scikit_learn():
    digits = load_digits()
    truth = Counter(
        (x.tobytes(), int(y)) for x, y in zip((digits.images * 15).astype(np.uint8), digits.target, strict=True)
    )
    found = {split: Counter((x.tobytes(), int(y)) for x, y in zip(*scans(split), strict=True)) for split in SPLIT_SIZES}
    assert {split: sum(c.values()) for split, c in found.items()} == SPLIT_SIZES
    assert sum(found.values(), Counter()) == truth


def test_no_scan_of_one_split_is_in_another():
    pictures = {split: {x.tobytes() for x in scans(split)[0]} for split in SPLIT_SIZES}
    assert pictures["train"].isdisjoint(pictures["val"])
    assert pictures["train"].isdisjoint(pictures["test"])
    assert pictures["val"].isdisjoint(pictures["test"])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_scene_draws_only_scans_of_its_split(split, monkeypatch):
    asked = []
    monkeypatch.setattr(scene, "scans", lambda name: asked.append(name) or scans(name))
    SMALL.example(0, split, 0)
    assert asked == [split]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_has_every_digit(split):
    assert set(scans(split)[1].tolist()) == set(range(10))


def test_an_unknown_split_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"split among .*test.*train.*val.*got 'dev'"):
        scans("dev")


def test_glyphs_are_all_different_and_leave_room_to_shift():
    found = glyphs()
    assert found.shape == (len(LETTERS) + len(DECOYS), 8, 8)
    assert len({g.tobytes() for g in found}) == len(found)
    assert (found[:, 7].max(), found[:, :, 7].max()) == (0, 0)


@every_preset
def test_every_question_is_answered_by_the_digit_right_of_its_only_key(preset):
    task = PRESETS[preset]
    for index in range(6):
        example, drawn = task.example(0, "train", index), scene_of(task, index)
        assert all(np.array_equal(a, b) for a, b in zip(example.images, drawn.images, strict=True))
        assert example.n_turns == task.n_turns
        for turn in example.turns:
            (image, row, column), digit = solve(drawn.cells, turn.question)
            assert turn.answer == str(digit)
            assert [vars(ref) for ref in turn.evidence] == [
                {"image": image, "row": row, "column": column + i} for i in (0, 1)
            ]


@every_preset
def test_every_key_of_a_scene_is_unique_and_has_its_digit(preset):
    task = PRESETS[preset]
    for index in range(6):
        drawn = scene_of(task, index)
        is_key = (drawn.cells >= KEY0) & (drawn.cells < DECOY0)
        places = np.argwhere(is_key)
        assert len(places) == task.n_needles == len(drawn.needles)
        assert len(set(drawn.cells[is_key].tolist())) == task.n_needles
        assert places[:, 2].max() < GRID - 1
        beside = drawn.cells[places[:, 0], places[:, 1], places[:, 2] + 1]
        assert ((beside >= DIGIT0) & (beside < KEY0)).all()


@every_preset
def test_needles_are_spread_evenly_over_the_images(preset):
    task = PRESETS[preset]
    held = np.bincount([needle.image for needle in scene_of(task, 0).needles], minlength=task.n_images)
    assert held.max() - held.min() <= 1


def test_turns_ask_distinct_keys():
    for index in range(10):
        questions = [turn.question for turn in SMALL.example(0, "train", index).turns]
        assert len(set(questions)) == SMALL.n_turns


def test_only_the_asked_colour_is_asked_and_it_has_the_promised_number_of_needles():
    for index in range(10):
        example, drawn = SUBSET.example(0, "train", index), scene_of(SUBSET, index)
        assert all(turn.question.startswith("<ask> red-") for turn in example.turns)
        colours = Counter(needle.name[0] for needle in drawn.needles)
        assert colours["red"] == 6
        assert colours.total() == 16


def test_any_colour_is_asked_without_an_asked_colour():
    questions = [t.question for i in range(20) for t in SMALL.example(0, "train", i).turns]
    assert {q.removeprefix("<ask> ").split("-")[0] for q in questions} == set(COLOURS)


def test_answers_are_uniform():
    digits = [
        needle.digit
        for index in range(80)
        for needle in draw_scene(
            SMALL.rng(0, "train", index), np.arange(N_KEYS), n_images=10, split="train", orphans=0, decoys=0
        ).needles
    ]
    assert len(digits) >= 5000
    shares = np.bincount(digits, minlength=10) / len(digits)
    assert np.abs(shares - 0.1).max() < 0.02


def test_where_a_needle_lies_tells_nothing_of_its_digit():
    drawn = [n for i in range(80) for n in draw_scene(
        SMALL.rng(1, "train", i), np.arange(N_KEYS), n_images=10, split="train", orphans=0, decoys=0
    ).needles]  # fmt: skip
    for group in (lambda n: n.row, lambda n: n.column, lambda n: n.image):
        for value in {group(n) for n in drawn}:
            digits = [n.digit for n in drawn if group(n) == value]
            assert abs(np.mean(digits) - 4.5) < 4 * 2.872 / len(digits) ** 0.5


def test_more_needles_than_fit_are_refused_and_as_many_as_fit_are_placed():
    rng = np.random.default_rng(0)
    assert len(draw_scene(rng, np.arange(8), n_images=1, split="train").needles) == 8
    with pytest.raises(ValueError, match="9 needles do not fit 1 images of 4 x 4 cells"):
        draw_scene(rng, np.arange(9), n_images=1, split="train")


def test_an_orphan_digit_is_never_right_of_a_key_that_is_not_its_own():
    for index in range(10):
        drawn = scene_of(SMALL, index)
        of_needles = {(n.image, n.row, n.column + 1) for n in drawn.needles}
        for image, row, column in np.argwhere((drawn.cells >= DIGIT0) & (drawn.cells < KEY0)).tolist():
            if (image, row, column) not in of_needles:
                assert column == 0 or not KEY0 <= drawn.cells[image, row, column - 1] < DECOY0


def test_the_first_turn_alone_is_the_first_of_many():
    many, one = SMALL.example(0, "test", 2), SMALL.example(0, "test", 2, n_turns=1)
    assert one.turns == many.turns[:1]
    assert (one.query_position, many.query_position) == ("after", "deferred_turn")


def test_natural_wording_asks_the_same_in_english():
    symbolic, natural = (SUBSET.example(0, "train", 0, style=style) for style in ("symbolic", "natural"))
    for short, long in zip(symbolic.turns, natural.turns, strict=True):
        colour, letter = short.question.removeprefix("<ask> ").split("-")
        assert f"the {colour} letter {letter}?" in long.question
        assert (short.answer, short.evidence) == (long.answer, long.evidence)
        assert (short.max_new_tokens, long.max_new_tokens) == (1, 8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_needles": 0}, "n_needles between 1 and 78, got 0"),
        ({"n_needles": 79}, "n_needles between 1 and 78, got 79"),
        ({"n_images": 2, "n_needles": 17}, "n_needles between 1 and 16, got 17"),
        ({"asked_colour": "pink", "n_asked": 9}, "asked_colour among red, green, blue, got 'pink'"),
        ({"asked_colour": "red"}, "n_asked exactly when task.asked_colour is set, got None"),
        ({"n_asked": 8}, "n_asked exactly when task.asked_colour is set, got 8"),
        ({"n_turns": 0}, "n_turns between 1 and the 24 askable needles, got 0"),
        ({"n_turns": 25}, "n_turns between 1 and the 24 askable needles, got 25"),
        ({"asked_colour": "red", "n_asked": 4}, "n_turns between 1 and the 4 askable needles, got 8"),
        ({"asked_colour": "red", "n_asked": 27}, "n_asked .*got 27"),
        ({"asked_colour": "red", "n_asked": 10, "n_needles": 9}, "n_asked .*got 10"),
        ({"asked_colour": "red", "n_asked": 8, "n_needles": 70}, "n_(asked|needles) .*got (8|70)"),
        ({"cell_px": 7}, "cell_px of at least 8, got 7"),
    ],
)
def test_tasks_without_meaning_are_refused_with_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=f"expected task.{sentence}"):
        Needles(**changes)


@pytest.mark.parametrize("cell_px", [8, 16, 24, 28, 32])
def test_a_cell_has_as_many_pixels_as_asked_and_keeps_its_content(cell_px):
    plain, large = (
        Needles(n_images=2, n_needles=6, n_turns=2, cell_px=px).example(0, "train", 0) for px in (8, cell_px)
    )
    assert large.turns == plain.turns
    for small, image in zip(plain.images, large.images, strict=True):
        assert image.shape == (GRID * cell_px, GRID * cell_px, 3)
        assert image.dtype == np.uint8
        source = np.arange(GRID * cell_px) * 8 // cell_px
        assert np.array_equal(image, small[source][:, source])


def test_the_task_is_registered_with_its_chance_level():
    assert TASKS["needles"] is Needles
    assert Needles.chance == SMALL.example(0, "train", 0).meta["chance"] == 0.1


def test_evidence_tokens_are_the_visual_tokens_of_the_key_and_its_digit(embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    tasks = [SMALL, Needles(n_images=1, n_needles=3, n_turns=3)]
    rendered = renderer.render([task.example(0, "train", 7) for task in tasks])
    pixels, first = rendered.inputs["pixel_values"], 0
    for row, task in enumerate(tasks):
        cells = scene_of(task, 7).cells
        real = rendered.inputs["attention_mask"][row].bool()
        visual = rendered.visual[row][real]
        assert torch.equal(visual, rendered.inputs["input_ids"][row][real] == 2)
        places = visual.nonzero().flatten().tolist()
        assert len(places) == 16 * task.n_images
        for turn, found in zip(rendered.examples[row].turns, rendered.evidence[row], strict=True):
            (image, line, column), _ = solve(cells, turn.question)
            assert found == sorted(found)
            assert [places.index(p) for p in found] == [16 * image + 4 * line + column + i for i in (0, 1)]
            for p in found:
                index, cell = divmod(places.index(p), 16)
                y, x = 8 * (cell // 4), 8 * (cell % 4)
                seen = pixels[first + index, :, y : y + 8, x : x + 8] * 0.35 + 0.3
                drawn = rendered.examples[row].images[index][y : y + 8, x : x + 8].transpose(2, 0, 1) / 255
                torch.testing.assert_close(seen, torch.tensor(drawn, dtype=torch.float32), rtol=0, atol=1e-5)
        first += task.n_images
