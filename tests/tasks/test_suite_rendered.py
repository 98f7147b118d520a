"""The procedural tasks before real processors: where evidence lies among their tokens, and where a question stands."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from retention.config import compose
from retention.data.example import EvidenceRef, Example, Segment, Turn
from retention.data.render import Renderer
from retention.models import family_of
from retention.tasks.doc_pages import DocPages
from retention.tasks.haystack_any_all import HaystackAnyAll
from retention.tasks.needle import Needle
from retention.tasks.ruler.task import KINDS, SYMBOLIC, Ruler
from retention.tasks.tile_index import TileIndex
from retention.tasks.tpr_stress import TprStress
from tests import hub, zoo

FAMILIES = ("llava", "qwen2_5_vl", "internvl", "idefics3", "llava_next", "llava_onevision")
"""One square per image, three-axis positions, tiles and an overview, an overview and rows that end."""
GRID, SIDE_PX = 4, 64
SWEEP = compose("eval", []).task


def renderer_of(name):
    model, processor = zoo.loaded(name)
    return model, Renderer(processor, family_of(model).visual_ids(model.config))


def entering(model, inputs):
    """What the first layer of the language model reads when no patch attends to another."""
    modules, seen = dict(model.named_modules()), []
    first = next(m for name, m in modules.items() if re.search(r"(language|text)_model\.layers\.0$", name))
    attention = [m for name, m in modules.items() if "vis" in name and name.endswith(("attn", "attention"))]
    handles = [
        first.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
        *[
            module.register_forward_hook(
                lambda _, args, out: (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out
            )
            for module in attention
        ],
    ]
    assert attention
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("n_images", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cell_is_the_tokens_that_change_with_it(name, n_images):
    """A cell painted over changes the tokens it is mapped to most."""
    model, renderer = renderer_of(name)
    images = [zoo.picture(SIDE_PX, SIDE_PX, seed=i) // 4 for i in range(n_images)]
    cell = SIDE_PX // GRID
    for row, column in ((0, 0), (1, 3), (2, 1)):
        ref = EvidenceRef(n_images - 1, row, column)
        painted = images[-1].copy()
        painted[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
        pair = [
            Example("x", [Segment("image", x) for x in shown], [Turn("q", "a", [ref])], "after", {"grid": GRID})
            for shown in (images, [*images[:-1], painted])
        ]
        rendered = [renderer.render([example]) for example in pair]
        plain, other = (entering(model, x.inputs) for x in rendered)
        change = (plain - other).norm(dim=-1)
        found = rendered[0].evidence[0][0]
        rest = sorted(set(rendered[0].visual[0].nonzero().flatten().tolist()) - set(found))
        assert rendered[0].visual[0][found].all()
        assert change[found].mean() > 2 * change[rest].mean()
        assert int(change.argmax()) in found


def spoken(example):
    """The evidence of the first turn in the order of the context, without spaces."""
    refs = sorted((ref for ref in example.turns[0].evidence), key=lambda ref: (ref.segment, ref.start))
    return "".join(example.segments[ref.segment].payload[ref.start : ref.end] for ref in refs).replace(" ", "")


def decoded(renderer, rendered):
    """What the tokens at its positions say."""
    ids = rendered.inputs["input_ids"][0]
    return renderer.tokenizer.decode(ids[rendered.evidence[0][0]]).replace(" ", "")


@pytest.mark.parametrize(
    "task",
    [
        Needle(kind="text", n_images=3, n_words=24),
        Needle(n_images=3, tier="symbolic"),
        HaystackAnyAll(n_images=3, tier="symbolic", query_position="before"),
    ],
    ids=["needle", "words", "before"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_evidence_in_text_decodes_to_what_it_is(name, task):
    """Between images too, whatever a processor writes around them."""
    _, renderer = renderer_of(name)
    for index in range(2):
        example = task.example(0, "train", index, style="natural")
        rendered = renderer.render([example])
        assert decoded(renderer, rendered) == spoken(example)


@pytest.mark.parametrize("task", [TileIndex(side=1, n_images=4), DocPages(n_pages=3)], ids=["tiles", "pages"])
@pytest.mark.parametrize("name", ["embedded", *FAMILIES])
def test_all_evidence_of_painted_boards_is_found(name, task, embedded_processor):
    renderer = Renderer(embedded_processor, [2]) if name == "embedded" else renderer_of(name)[1]
    example = replace(task, cell_px=16).example(0, "test", 0, style="natural")
    if name == "embedded":  # its vocabulary holds none of the questions' words
        example = replace(example, turns=[replace(turn, question="<ask>", answer="7") for turn in example.turns])
    rendered = renderer.render([example])
    for turn, found in zip(example.turns, rendered.evidence[0], strict=True):
        assert rendered.visual[0][found].all()
        assert len(found) >= min(len(turn.evidence), 1)


def test_a_question_before_its_context_is_not_repeated(embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    for style, chosen in (("symbolic", renderer), ("natural", renderer_of("qwen2_5_vl")[1])):
        task = Needle(n_images=2)
        asked, first = (
            replace(task, query_position=position).example(0, "test", 0, style=style)
            for position in ("after", "before")
        )
        assert first.turns[0].question == asked.turns[0].question
        behind, ahead = chosen.render([asked]), chosen.render([first])
        decode = chosen.tokenizer.decode
        question = " ".join(asked.turns[0].question.split())
        texts = [" ".join(decode(x.inputs["input_ids"][0]).split()) for x in (behind, ahead)]
        assert question in texts[1]
        assert question not in texts[0]
        assert question in " ".join(decode(behind.turns[0].questions[0]).split())
        cue = decode(ahead.turns[0].questions[0])
        assert question not in cue
        assert asked.turns[0].cue in cue
        lengths = [len(x.evidence[0][0]) for x in (behind, ahead)]
        assert lengths[0] == lengths[1]
        moved = np.subtract(ahead.evidence[0][0], behind.evidence[0][0])
        assert (moved == moved[0]).all()
        assert moved[0] > 0


@pytest.fixture(scope="module")
def text_renderer():
    tokenizer = hub.tokenizer({})
    tokenizer.chat_template = hub.TEMPLATE.replace("IMAGE", "")
    return Renderer(tokenizer, [])


@pytest.mark.parametrize("kind", KINDS)
def test_ruler_fills_its_length_and_no_more(kind, text_renderer):
    """Bytes are the tokens here."""
    task = Ruler(kind=kind, n_tokens=6000).measured(text_renderer.length)
    example = task.example(0, "test", 1, style="natural")
    rendered = text_renderer.render([example])
    turn = example.turns[0]
    used = rendered.lengths[0] + len(rendered.turns[0].questions[0]) + turn.max_new_tokens
    assert text_renderer.length(example) + turn.max_new_tokens == used
    assert 6000 - 450 < used <= 6000
    assert decoded(text_renderer, rendered) == spoken(example)
    same = task.example(0, "test", 1, style="natural")
    assert (same.turns, same.segments[0].payload) == (example.turns, example.segments[0].payload)
    assert turn.max_new_tokens == {"n": 128, "v": 30, "c": 120, "f": 50, "q": 32}[kind[0]]
    assert turn.scorer == ("contains_any" if kind.startswith("qa") else "contains_all")


def test_ruler_draws_what_its_table_says(text_renderer):
    made = {kind: Ruler(kind=kind, n_tokens=1500).example(0, "test", 0, style="natural") for kind in KINDS}
    needles = {k: e.segments[0].payload.count("A secret") for k, e in made.items()}
    assert needles["niah_single_1"] == needles["niah_single_2"] == needles["niah_single_3"] == 1
    assert needles["niah_multikey_1"] == needles["niah_multivalue"] == needles["niah_multiquery"] == 4
    assert min(needles["niah_multikey_2"], needles["niah_multikey_3"]) > 10
    answers = {kind: len(e.turns[0].answer) if isinstance(e.turns[0].answer, list) else 1 for kind, e in made.items()}
    assert answers == dict.fromkeys(KINDS, 1) | {
        "niah_multivalue": 4,
        "niah_multiquery": 4,
        "vt": 5,
        "cwe": 10,
        "fwe": 3,
    }
    assert len(made["niah_multikey_3"].turns[0].answer) == 36
    assert made["niah_single_1"].turns[0].answer.isdigit()
    assert len(made["niah_single_1"].turns[0].answer) == 7


@pytest.mark.parametrize("kind", SYMBOLIC)
def test_ruler_in_the_words_of_the_embedded_model(kind, embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    task = Ruler(kind=kind, n_tokens=128).measured(renderer.length)
    example = task.example(0, "test", 0)
    rendered = renderer.render([example])
    assert rendered.lengths[0] + 3 <= 128
    told = embedded_processor.tokenizer.convert_ids_to_tokens(
        rendered.inputs["input_ids"][0][rendered.evidence[0][0]].tolist()
    )
    assert told == [example.turns[0].question.removeprefix("<ask> "), example.turns[0].answer]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9, 1.1, 2, 4])
def test_text_is_as_long_as_its_multiple_of_the_budget_says(ratio, embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    task = SWEEP[f"tpr_stress_{100 * ratio:g}"].measured(renderer.length)
    example = task.example(0, "test", 0)
    assert task.example(0, "test", 0).meta["n_text_tokens"] == example.meta["n_text_tokens"] == round(128 * ratio)
    silent = replace(task, text_to_budget=0.0).measured(renderer.length).example(0, "test", 0)
    assert silent.meta["n_text_tokens"] == 0
    assert renderer.length(example) - renderer.length(silent) == round(128 * ratio)
    assert [image.shape for image in silent.images] == [image.shape for image in example.images]


def test_sentences_stop_before_the_text_is_too_long():
    """Bytes are the tokens here."""
    renderer = renderer_of("qwen2_5_vl")[1]
    example = TprStress(text_to_budget=2.0, budget=200).measured(renderer.length).example(0, "test", 0, style="natural")
    assert 400 - 60 < example.meta["n_text_tokens"] <= 400
    assert example.id.startswith("tpr_stress/v1-8x12-8t-2of200-")


SYMBOLS = {
    "text_tier": Needle(tier="symbolic", n_images=3),
    "filler": TprStress(n_words=40, tier="symbolic", n_images=2, n_needles=4, n_turns=2),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_words_of_the_symbolic_tier_are_in_the_embedded_vocabulary(name, embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    example = SYMBOLS[name].example(0, "test", 0)
    rendered = renderer.render([example])
    words = sum(len(segment.payload.split()) for segment in example.segments)
    assert rendered.lengths[0] == words + 1  # and the token that begins a sequence
    for turn, found in zip(example.turns, rendered.evidence[0], strict=True):
        told = embedded_processor.tokenizer.convert_ids_to_tokens(rendered.inputs["input_ids"][0][found].tolist())
        assert told == [turn.question.removeprefix("<ask> "), turn.answer]
