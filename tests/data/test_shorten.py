"""Prompts over their limit lose tokens where benchmarks take them, and evidence follows."""

import pytest

from retention.data.example import EvidenceRef, Example, Limit, Segment, TextRef, Turn
from retention.data.render import Renderer
from retention.data.shorten import shortened
from retention.models import family_of
from tests.zoo import loaded, picture


@pytest.fixture(scope="module")
def renderer():
    """Bytes as tokens: a character is a token."""
    model, processor = loaded("qwen2_vl")
    return Renderer(processor, family_of(model).visual_ids(model.config))


def short(renderer, example):
    return shortened(example, renderer.template, renderer.image_tokens)


def texts(example):
    return [s.payload if s.kind == "text" else "IMAGE" for s in example.segments]


def example(limit, evidence=(), parts=("0123456789", "abcdefghij"), question="????"):
    segments = [Segment("text", part) for part in parts]
    return Example("x", segments, [Turn(question, "a", list(evidence))], "after", limit=limit)


def test_the_middle_of_context_and_question_goes_and_both_ends_stay(renderer):
    assert texts(short(renderer, example(Limit(24)))) == ["0123456789", "abcdefghij"]
    assert texts(short(renderer, example(Limit(14)))) == ["0123456", "hij"]
    assert short(renderer, example(Limit(14))).meta["cut_tokens"] == 10
    assert texts(short(renderer, example(Limit(8)))) == ["0123"]
    assert texts(short(renderer, example(None))) == ["0123456789", "abcdefghij"]


def test_the_start_of_what_follows_the_instruction_goes(renderer):
    assert texts(short(renderer, example(Limit(18, "start", 1)))) == ["0123456789", "ghij"]
    assert texts(short(renderer, example(Limit(18, "start")))) == ["6789", "abcdefghij"]


def test_images_leave_whole_and_count_their_tokens(renderer):
    images = [Segment("image", picture(16, 16, seed=i)) for i in range(3)]
    size = renderer.image_tokens(images[0].payload)
    assert size > 1
    parts = [Segment("text", "Look."), images[0], Segment("text", "one"), images[1], images[2]]
    turn = Turn("????", "a", [EvidenceRef(2, 1, 0)])
    long = Example("x", parts, [turn], "after", limit=Limit(5 + size + 4, "start", 1))
    found = short(renderer, long)
    assert texts(found) == ["Look.", "IMAGE"]
    assert found.segments[1].payload is images[2].payload
    assert found.turns[0].evidence == [EvidenceRef(0, 1, 0)]
    assert len(renderer.render([long]).examples[0].images) == 1


def test_evidence_moves_with_its_text_and_is_unknown_once_cut(renderer):
    kept = [TextRef(0, 2, 5), TextRef(1, 8, 10)]
    found = short(renderer, example(Limit(14), kept))
    assert found.turns[0].evidence == [TextRef(0, 2, 5), TextRef(1, 1, 3)]
    assert [found.segments[r.segment].payload[r.start : r.end] for r in found.turns[0].evidence] == ["234", "ij"]
    assert short(renderer, example(Limit(14), [TextRef(0, 5, 9)])).turns[0].evidence == []
    gone = short(renderer, example(Limit(18, "start"), [TextRef(1, 0, 2)], ("012345", "a" * 10, "zz")))
    assert [gone.segments[r.segment].payload for r in gone.turns[0].evidence] == ["a" * 10]


def test_questions_are_never_cut(renderer):
    with pytest.raises(ValueError, match="room for the question of 4 tokens, got 6 for x"):
        short(renderer, example(Limit(6)))
    with pytest.raises(ValueError, match="a limit of at least 1 token, at the middle or the start, got 0 at 'middle'"):
        Limit(0)


def test_a_limit_holds_for_what_is_rendered(renderer):
    long = example(Limit(300), parts=("word " * 400,), question="What was said?")
    rendered = renderer.render([long])
    text = renderer.tokenizer.decode(rendered.inputs["input_ids"][0])
    assert text.count("word") * 5 == pytest.approx(300 - 14, abs=10)
    glue = len(renderer.render([example(None, parts=("",))]).inputs["input_ids"][0])
    assert rendered.lengths[0] == 300 - 14 + glue


def test_a_text_without_template_is_read_as_it_is(renderer):
    plain = Example("x", [Segment("text", "def f():\n")], [Turn("    return", "1")], "after", plain=True)
    rendered = renderer.render([plain])
    assert renderer.tokenizer.decode(rendered.inputs["input_ids"][0], skip_special_tokens=True) == "def f():\n"
    assert renderer.tokenizer.decode(rendered.turns[0].questions[0]) == "    return"


def test_images_need_a_model_that_sees_them():
    model, tokenizer = loaded("llama")
    shown = Example("mine", [Segment("image", picture(16, 16))], [Turn("?", "a")], "after")
    with pytest.raises(ValueError, match="mine shows images and this model reads text alone"):
        Renderer(tokenizer, family_of(model).visual_ids(model.config)).render([shown])
