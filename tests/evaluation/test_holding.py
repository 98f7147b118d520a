"""What rows say of what a cache held; and a cache that answers independent questions is what it was before."""

from dataclasses import replace

import pytest
import torch

from retention import Budget, CacheConfig
from retention.attach.hard import evicting
from retention.data.render import Renderer
from retention.evaluation.arms import Arm
from retention.evaluation.holding import distance, evidence_recall, kept_by, visual_positions
from retention.evaluation.protocol import Protocol
from retention.evaluation.runner import Runner, axes
from retention.models import family_of
from retention.policies import POLICIES
from retention.tasks.answering import answer_turns, prefill
from retention.tasks.needles import Needles


@pytest.fixture(scope="module")
def runner(embedded_model, embedded_processor):
    renderer = Renderer(embedded_processor, family_of(embedded_model).visual_ids(embedded_model.config))
    return Runner(embedded_model, renderer, "symbolic")


@pytest.fixture(scope="module")
def examples():
    """Of two lengths."""
    return [Needles(n_images=n, n_needles=2 * n, n_turns=2).example(0, "test", n) for n in (2, 3)]


def arm(name, budget, words="agnostic", **cache):
    protocol = Protocol.parse(words)
    config = CacheConfig(Budget.parse(budget), chunk_by_image=words == "streaming", **cache)
    return Arm(name, POLICIES[name](), config, budget, protocol, needs_gates=False)


def test_kept_entries_are_told_by_layer_and_modality(runner, examples):
    batch = runner.renderer.render(examples)
    ((_, full, whole), (_, cache, rows)) = runner.run(batch, [arm("full", "100%"), arm("streaming_llm", "24")], None)
    for row in rows + whole:
        assert sum(row["kept_by"]["layer"]) == sum(row["kept_by"]["modality"].values()) == row["kept"]
    places = visual_positions(cache)
    for i, length in enumerate(batch.lengths):
        own = batch.visual[i][batch.inputs["attention_mask"][i].bool()]
        assert torch.equal(places[i, :length], own)
        heads = cache.shape.num_layers * cache.shape.num_kv_heads
        assert whole[2 * i]["kept_by"]["modality"]["image"] == int(own.sum()) * heads
    assert [list(row["evidence_recall"].values())[:2] for row in whole] == [[1, 1]] * 4
    assert [row["policy_args"] for row in rows[:1]] == [{"sinks": 4}]
    assert {row["bytes"]["peak_logical"] for row in rows} == {full.bytes().logical_total // 2}
    assert {row["variant"] for row in rows} == {"2x4-any", "3x6-any"}


def test_nothing_held_is_nothing_recalled():
    table = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    assert evidence_recall(table[:, 0], [1, 2]) == {"any": 0, "mean": 0}
    assert evidence_recall(~table[:, 0], [1, 2]) == {"any": 1, "mean": 1}
    assert evidence_recall(table[:, 0], None) == evidence_recall(table[:, 0], []) == {"any": None, "mean": None}
    table[1, 0, 2, :3] = True
    visual = torch.tensor([[False, True, True, True, True]])
    assert kept_by(table, visual) == [{"layer": [0, 3], "modality": {"text": 1, "image": 2}}]
    assert evidence_recall(table[:, 0], [2, 3]) == {"any": 0.5, "mean": pytest.approx(1 / 12)}


def test_distance_is_counted_to_the_end_of_what_was_read():
    assert distance([10, 20], 100, 1.0) == 85
    assert distance([10, 20], 100, 2.0) == 170
    assert distance(None, 100, 1.0) is None


def test_the_four_choices_of_a_protocol_are_those_of_the_example(examples):
    example, plain = examples[0], arm("streaming_llm", "24")
    told = {"question": "agnostic", "turns": "multi", "trigger": "after_prefill", "positions": "original"}
    assert axes(plain, example) == told
    assert axes(plain, replace(example, independent=True))["turns"] == "cloned"
    assert axes(plain, replace(example, turns=example.turns[:1]))["turns"] == "single"
    writing, every = replace(example, evicts_answers=True), arm("streaming_llm", "24", "streaming", evict_every=8)
    assert axes(every, writing)["trigger"] == "chunked(image)+decode(8)"
    assert axes(every, example)["trigger"] == "chunked(image)"
    assert axes(arm("full", "100%"), writing) == told


def test_asking_independent_questions_leaves_the_evicted_cache_bit_identical(runner, examples):
    batch = runner.renderer.render([replace(example, independent=True) for example in examples])
    config = CacheConfig(Budget.parse("24"))
    with evicting(runner.model, POLICIES["streaming_llm"](), config, tokenizer=runner.renderer.tokenizer) as cache:
        prefill(runner.model, cache, batch)
        before = {name: [x.clone() for x in found] for name, found in cache.tensors().items()}
        first, second = (answer_turns(runner.model, cache, batch) for _ in range(2))
        after = cache.tensors()
    assert first == second
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name], after[name], strict=True))
