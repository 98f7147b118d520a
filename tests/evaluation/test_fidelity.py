"""What an arm loses against the full cache on the reference answers: nothing where nothing left, else what hand-made sums say."""

import math
from dataclasses import replace

import pytest
import torch

from retention import Budget, CacheConfig
from retention.attach.forward import next_logits
from retention.attach.hard import evicting
from retention.data.render import Renderer
from retention.evaluation.arms import Arm
from retention.evaluation.fidelity import agreement, divergence, missing_mass, weighted_recall
from retention.evaluation.protocol import Protocol
from retention.evaluation.runner import Runner
from retention.evaluation.written import Written
from retention.models import family_of
from retention.policies import POLICIES
from retention.tasks.answering import prefill
from retention.tasks.needles import Needles


@pytest.fixture(scope="module")
def runner(embedded_model, embedded_processor):
    renderer = Renderer(embedded_processor, family_of(embedded_model).visual_ids(embedded_model.config))
    return Runner(embedded_model, renderer, "symbolic", teacher=True)


@pytest.fixture(scope="module")
def batch(runner):
    task = Needles(n_images=3, n_needles=6, n_turns=2)
    examples = [task.example(0, "test", 0), Needles(n_images=2, n_needles=4, n_turns=2).example(0, "test", 1)]
    return runner.renderer.render(examples)  # of two lengths


def run(runner, batch, protocol, *cells, **cache):
    cache |= {"chunk_by_image": protocol != "agnostic"}
    arms = [
        Arm(name, POLICIES[name](), CacheConfig(Budget.parse(budget), **cache), budget, Protocol.parse(protocol), False)
        for name, budget in cells
    ]
    return {(arm.name, arm.budget): (cache.kept_table(), rows) for arm, cache, rows in runner.run(batch, arms, None)}


@pytest.mark.parametrize("protocol", ["agnostic", "aware", "streaming"])
def test_nothing_evicted_is_nothing_lost(runner, batch, protocol):
    found = run(runner, batch, protocol, ("full", "100%"), ("knorm", "9999"), ("streaming_llm", "24"))
    evicted = found.pop(("streaming_llm", "24"))[1]
    assert max(row["kl_teacher"] for row in evicted) > 0.01
    assert min(row["missing_mass"]["mean"] for row in evicted) > 0.01
    assert all(row["missing_mass"]["mean"] <= row["missing_mass"]["p90"] <= 1 for row in evicted)
    for row in (row for _, rows in found.values() for row in rows):
        assert (
            row["kl_teacher"] == 0 if protocol != "streaming" else row["kl_teacher"] < 1e-5
        )  # other chunks, other sums
        assert row["top1_agree"] == 1
        assert row["missing_mass"]["mean"] == row["missing_mass"]["p90"] == 0
        assert row["evidence_recall"]["weighted"] == pytest.approx(1)


@torch.no_grad()
def test_figures_are_those_of_a_plain_forward_over_context_and_dialogue(runner, batch, embedded_model):
    (table, rows), = run(runner, batch, "agnostic", ("streaming_llm", "24")).values()  # fmt: skip
    decoder, columns = embedded_model, batch.inputs["attention_mask"][0].bool()
    turns, row = batch.turns[0], rows[0]
    said = turns.questions[0] + turns.answers[0]
    ids = torch.cat([batch.inputs["input_ids"][0][columns], torch.tensor(said[:-1])])[None]
    images = {k: v[: len(batch.examples[0].images)] for k, v in batch.inputs.items() if k.startswith("pixel")}
    before = decoder.config.get_text_config()._attn_implementation
    decoder.set_attn_implementation({"text_config": "eager"})
    try:
        out = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True, **images)
    finally:
        decoder.set_attn_implementation({"text_config": before})
    length, count = batch.lengths[0], len(turns.answers[0])
    kept = table[:, 0, :, :length].repeat_interleave(out.attentions[0].shape[1] // table.shape[2], 1)
    mass = torch.stack([
        (layer[0, :, -count:, :length] * ~held[:, None]).sum(-1) for layer, held in zip(out.attentions, kept, strict=True)
    ])  # fmt: skip
    assert row["missing_mass"]["mean"] == pytest.approx(float(mass.mean()), abs=1e-5)
    assert row["missing_mass"]["p90"] == pytest.approx(float(mass.flatten().quantile(0.9)), abs=1e-5)
    assert row["missing_mass"]["by_layer"] == pytest.approx(mass.mean((1, 2)).tolist(), abs=1e-5)
    parts = row["missing_mass"]["text"] + row["missing_mass"]["image"]
    assert parts == pytest.approx(row["missing_mass"]["mean"], abs=1e-5)
    share = runner.missing.share
    assert share.sum(-1).mean() == pytest.approx(sum(r["missing_mass"]["mean"] for r in rows) / len(rows), abs=1e-5)


def test_long_answers_are_held_against_what_the_full_cache_writes(runner, batch):
    examples = [
        replace(e, evicts_answers=True, turns=[replace(turn, max_new_tokens=3) for turn in e.turns])
        for e in batch.examples
    ]
    long = runner.renderer.render(examples)
    for protocol in ("agnostic", "streaming"):
        cells = (("full", "100%"), ("knorm", "9999"), ("streaming_llm", "24"))
        found = {name: rows for (name, _), (_, rows) in run(runner, long, protocol, *cells, evict_every=2).items()}
        for row in found["full"] + found["knorm"]:
            assert row["kl_teacher"] == 0 if protocol == "agnostic" else row["kl_teacher"] < 1e-5
            assert row["top1_agree"] == 1
        assert [r["prediction"] for r in found["full"]] == [r["prediction"] for r in found["knorm"]]
        assert max(row["kl_teacher"] for row in found["streaming_llm"]) > 0.01
        assert all(row["missing_mass"] is None for rows in found.values() for row in rows)


@torch.no_grad()
def test_an_arm_evicts_while_it_reads_what_the_full_cache_wrote(runner, batch):
    long = runner.renderer.render([
        replace(e, evicts_answers=True, turns=[replace(e.turns[0], max_new_tokens=6)]) for e in batch.examples
    ])  # fmt: skip
    model, tokenizer, config = runner.model, runner.renderer.tokenizer, CacheConfig(Budget.parse("20"), evict_every=2)
    with evicting(model, POLICIES["full"](), tokenizer=tokenizer) as full:
        prefill(model, full, long)
        teacher = Written.of(model, full, long, 0)
    with evicting(model, POLICIES["streaming_llm"](), config, tokenizer=tokenizer) as cache:
        prefill(model, cache, long)
        told, _ = teacher.judge(cache)
        assert cache.columns == long.inputs["input_ids"].shape[1]
    for i, example in enumerate(long.examples):  # one context alone, by hand
        alone, text = runner.renderer.render([example]), teacher.batch.turns[i].answers[0]
        assert len(text) == 6
        with evicting(model, POLICIES["streaming_llm"](), config, tokenizer=tokenizer) as cache:
            prefill(model, cache, alone)
            fed, logits = long.turns[i].questions[0], []
            for token in text:
                ids = torch.tensor([fed])
                logits.append(next_logits(model, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0])
                fed = [token]
                assert (cache.kept().float().mean((0, 2)) <= 20 + 1).all()
        expected = divergence(teacher.logits[0][i], torch.stack(logits))
        assert told[i][0]["kl_teacher"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert expected > 0.001


def test_without_a_teacher_all_of_it_is_missing(runner, batch):
    plain = Runner(runner.model, runner.renderer, "symbolic")
    (_, rows), = run(plain, batch, "agnostic", ("streaming_llm", "24")).values()  # fmt: skip
    for row in rows:
        assert (
            row["kl_teacher"] is row["top1_agree"] is row["missing_mass"] is row["evidence_recall"]["weighted"] is None
        )
        assert row["ms"]["prefill"] > 0 < row["ms"]["decode_per_token"]
        assert abs(sum(row["bytes"]["items"].values()) - row["bytes"]["kept"]) < 10  # whole bytes per context
    assert plain.missing is None


def test_hand_made_sums():
    full, policy = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert divergence(full, policy) == pytest.approx((0.75 * math.log(3) - 0.25 * math.log(3)) / 2)
    assert agreement(full, policy) == 0.5
    rows = torch.tensor([[[[0.5, 0.3, 0.2]], [[0.1, 0.1, 0.8]]]])  # one layer, two heads, one token
    kept = torch.tensor([[[True, False, False]]])  # of one entry
    share = missing_mass(rows, kept, torch.tensor([False, False, True]))
    assert torch.allclose(share[0, :, 0], torch.tensor([[0.3, 0.2], [0.1, 0.8]]))
    both = torch.tensor([[[True, False, False], [False, False, True]]])
    assert weighted_recall(rows, both, [0, 2]) == pytest.approx((0.7 * 0.5 + 0.9 * 0.5) / 1.6)
    assert weighted_recall(rows, both, [2]) == pytest.approx(0.8 / 1.0)
    assert weighted_recall(rows, both, None) is None
