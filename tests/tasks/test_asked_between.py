"""Questions that do not simply follow their context: one between frames, and one that shows a picture."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from retention.config import compose
from retention.data.render import Renderer
from retention.evaluation.arms import make_arm
from retention.evaluation.protocol import Protocol
from retention.evaluation.runner import Runner
from retention.models import family_of
from retention.tasks.needle import Needle
from retention.tasks.stream_video import StreamVideo
from tests import zoo

STREAM = StreamVideo(n_frames=12, n_events=4, n_turns=1, query_position="before", asked_at=0.5)


@pytest.fixture(scope="module")
def natural():
    model, processor = zoo.loaded("qwen2_5_vl")
    return Runner(model, Renderer(processor, family_of(model).visual_ids(model.config)), "natural")


@pytest.mark.parametrize("tier", ["hard", "symbolic"])
def test_a_question_in_mid_stream_stands_between_its_frames_and_nowhere_else(tier, embedded_processor):
    renderer = Renderer(embedded_processor, [2])
    example = replace(STREAM, tier=tier).example(0, "test", 0)
    rendered = renderer.render([example])
    words = embedded_processor.tokenizer.convert_ids_to_tokens(rendered.inputs["input_ids"][0].tolist())
    asked = example.turns[0].question.split()
    places = [i for i in range(len(words)) if words[i : i + len(asked)] == asked]
    assert len(places) == 1
    ahead, behind = words[: places[0]], words[places[0] + len(asked) :]
    if tier == "symbolic":
        assert [ahead.count("<img>"), behind.count("<img>")] == [6, 6]
        found = [words[i] for i in rendered.evidence[0][0][:2]]
        assert found == [asked[1], example.turns[0].answer]
    else:
        visual = rendered.visual[0]
        assert visual[: places[0]].sum() == visual[places[0] :].sum() == 6 * 16
        assert visual[rendered.evidence[0][0]].all()
    assert asked[1] not in embedded_processor.tokenizer.convert_ids_to_tokens(rendered.turns[0].questions[0])


def test_events_asked_about_in_mid_stream_have_begun_or_are_to_come():
    begun = Counter()
    for index in range(24):
        example = replace(STREAM, tier="symbolic").example(0, "test", index, style="natural")
        ahead = min(ref.segment for ref in example.turns[0].evidence) < example.asked_behind
        assert example.meta["groups"] == {"event": "begun" if ahead else "to come"}
        begun[ahead] += 1
    assert min(begun[True], begun[False]) > 4
    assert replace(STREAM, asked_at=0.0).example(0, "test", 0).asked_behind == 0


def test_a_stream_is_evicted_on_both_sides_of_its_question(natural):
    config = compose("eval", [])
    (batch,) = natural.batches(replace(STREAM, cell_px=28), "test", 0, 2, 2)
    arm = make_arm(config, "streaming_llm", "64", Protocol.parse("streaming"), None)
    ((_, cache, rows),) = natural.run(batch, [arm], None)
    assert (cache.kept() == 64).all()
    assert (cache.seen() > 200).all()
    assert [row["query_position"] for row in rows] == ["before", "before"]
    assert all(row["groups"]["event"] in ("begun", "to come") for row in rows)


def test_what_is_shown_is_another_drawing_and_comes_after_the_eviction(natural):
    task = Needle(kind="match", n_images=6, cell_px=28)
    example = task.example(0, "test", 1, style="natural")
    right = "ABCDEF".index(example.turns[0].answer)
    shown = example.later[1].payload
    assert shown.shape == example.images[right].shape
    assert not np.array_equal(shown, example.images[right])
    assert {ref.image for ref in example.turns[0].evidence} == {right}
    assert len(example.whole().images) == 7
    (batch,) = natural.batches(task, "test", 0, 2, 2)
    arm = make_arm(compose("eval", []), "knorm", "40", Protocol.parse("agnostic"), None)
    ((_, cache, rows),) = natural.run(batch, [arm], None)
    assert (cache.kept() == 40).all()
    assert cache.seen().tolist() == [
        a + b for a, b in zip(batch.lengths, batch.later["attention_mask"].sum(1).tolist(), strict=True)
    ]
    assert [row["scorer"] for row in rows] == ["choice_letter"] * 2
    assert [row["chance"] for row in rows] == [1 / 6] * 2
