"""The smoke sizes: every procedural task runs on a model with a tower, and a budget that holds all changes no answer."""

import numpy as np
import pytest

from retention.config import compose
from retention.data.render import Renderer
from retention.evaluation.arms import full_arm, make_arm
from retention.evaluation.protocol import Protocol
from retention.evaluation.runner import Runner
from retention.models import family_of
from retention.tasks import TASKS
from retention.tasks.benchmarks import BENCHMARKS
from tests import zoo

PROTOCOL = Protocol.parse("agnostic")


@pytest.fixture(scope="module")
def config():
    return compose("eval", ["experiment=smoke", "budgets=[9000]"])


@pytest.fixture(scope="module")
def runner():
    model, processor = zoo.loaded("llava")
    return Runner(model, Renderer(processor, family_of(model).visual_ids(model.config)), "natural")


def test_the_smoke_sizes_cover_every_procedural_task(config):
    assert set(config.tasks) == set(TASKS) - set(BENCHMARKS)
    assert config.examples == 32
    for name in config.tasks:
        example = config.task[name].example(0, "test", 0, style="natural")
        cells = sum(image.shape[0] * image.shape[1] // 64 + 2 for image in example.images)
        words = sum(len(s.payload.split()) for s in [*example.segments, *example.later] if s.kind == "text")
        assert cells + words <= 305, name


@pytest.mark.parametrize("name", sorted(set(TASKS) - set(BENCHMARKS)))
def test_a_budget_above_the_context_answers_as_the_full_cache(name, config, runner):
    (batch,) = runner.batches(config.task[name], "test", 0, 1, 1)
    arms = [full_arm(config, PROTOCOL), make_arm(config, "streaming_llm", "9000", PROTOCOL, None)]
    full, other = (rows for _, _, rows in runner.run(batch, arms, None))
    assert [row["prediction"] for row in full] == [row["prediction"] for row in other]
    assert len(full) == len(batch.examples[0].turns)
    assert np.isfinite([row["score"] for row in full]).all()
