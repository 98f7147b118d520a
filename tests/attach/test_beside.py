"""Gates that read more than the attention's input: modality, the text before, the budget; trained and in a cache."""

import copy
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from retention import Budget, CacheConfig, RetentionGates, attach_gates, evicting
from retention.gates import gate_from_dict
from retention.gates.dbtrim import DBTrim
from retention.gates.fastkvzip import FastKVzip
from retention.gates.per_head import PerHead
from retention.gates.trim import Trim
from retention.objectives.distillation import Distillation
from retention.objectives.kvzap import KVzap
from retention.policies.db_trim_kv import DBTrimKV
from retention.policies.full import Full
from retention.training.config import TrainConfig
from tests.attach.helpers import inputs_of, row_of
from tests.cache.helpers import KV_HEADS, LAYERS, Conversation, model_of, tokens
from tests.tiny import IMAGE_TOKEN

RANGE = {"budget_conditioned": True, "budget_min": 2.0, "budget_max": 16.0}
BESIDE = {"budget": RANGE, "modality": {"modality": "embedding"}, "text": {"text_prior": True}}
BESIDE["all"] = BESIDE["budget"] | BESIDE["modality"] | BESIDE["text"]
KINDS = {"trim": Trim, "linear": Trim, "rows": DBTrim, "scalar": DBTrim}
OWN = {"linear": {"gate_hidden": 0}, "scalar": {"scoring": "scalar"}}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_side = pytest.mark.parametrize("beside", BESIDE)
LENGTHS = [20, 13]


def gates_with(beside, kind="scalar", *, fresh=False, family="llava", half_life=10.0):
    settings = {"gate_hidden": 8, "init_half_life": half_life} | OWN.get(kind, {}) | BESIDE.get(beside, {})
    torch.manual_seed(0)
    gates = RetentionGates.for_model(KINDS[kind](**settings), model_of(family))
    if not fresh:
        for name, parameter in gates.named_parameters():
            if name.split(".")[-1] in ("modality", "prior", "tilt"):
                torch.nn.init.normal_(parameter, std=2.0)
    return gates.requires_grad_(False)


def read(gates, batch, family="llava", budget=None):
    with torch.no_grad(), attach_gates(model_of(family), gates, budget=budget) as record:
        model_of(family)(**batch, use_cache=False)
    return record


def prefilled(gates, batch, config, policy=None):
    """A cache after a prompt; use inside its block."""
    return evicting(model_of("llava"), policy or Full(), config, gates=gates, extra_collectors=("gate",))


def read_back(layer):
    """What a layer holds of its gate, 0 in holes."""
    state = layer.state()
    return state.log_beta * state.valid


@every_side
@every_kind
def test_they_start_as_plain_gates(beside, kind):
    hidden = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    visual = torch.arange(7).expand(2, -1) % 2 == 0
    plain, more = gates_with("", kind, fresh=True), gates_with(beside, kind, fresh=True)
    for layer in range(LAYERS):
        assert torch.equal(more(layer, hidden, visual=visual), plain(layer, hidden))
    assert set(more.tensors()) > set(plain.tensors())


@every_side
@every_kind
def test_every_parameter_learns_and_the_artefact_keeps_it(beside, kind, tmp_path):
    gates = gates_with(beside, kind).requires_grad_(True)
    batch, budget = inputs_of("llava", LENGTHS), torch.tensor([3.0, 12.0])
    with attach_gates(model_of("llava"), gates, budget=budget) as record:
        model_of("llava")(**batch, use_cache=False).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.parameters())
    gates.save_pretrained(tmp_path / "gates")
    again = RetentionGates.from_pretrained(tmp_path / "gates")
    assert again.config == gates.config
    for ours, theirs in zip(read(again, batch, budget=budget).stacked(), record.stacked(), strict=True):
        assert torch.equal(ours, theirs.detach())


@every_side
def test_a_cache_reads_what_training_reads(beside):
    """The first layer's input is the same in both; the budget is that in force."""
    gates, batch = gates_with(beside), inputs_of("llava", LENGTHS)
    trained = read(gates, batch, budget=torch.tensor([5.0, 5.0])).log_beta[0]
    with prefilled(gates, batch, CacheConfig(budget=Budget(5))) as cache, torch.no_grad():
        model_of("llava")(**batch, past_key_values=cache)
        state = cache.evicting_layers[0].state()
    real = batch["attention_mask"].bool()[:, None].expand_as(trained)
    torch.testing.assert_close(state.log_beta[real], trained[real], rtol=1e-5, atol=1e-6)
    plain = read(gates_with(""), batch).log_beta[0]
    assert (plain - trained)[real].abs().max() > 1e-3


@every_side
def test_padding_changes_nothing(beside):
    gates, batch, budget = gates_with(beside), inputs_of("llava", LENGTHS), torch.tensor([4.0, 9.0])
    batch["input_ids"][batch["attention_mask"] == 0] = 5  # the padding token embeds as 0, which no sum shows
    together = read(gates, batch, budget=budget)
    for row, length in enumerate(LENGTHS):
        alone = read(gates, row_of(batch, row), budget=budget[row : row + 1])
        for layer in range(LAYERS):
            found = together.log_beta[layer][row : row + 1, :, -length:]
            torch.testing.assert_close(found, alone.log_beta[layer], rtol=1e-4, atol=1e-5)


@every_side
@pytest.mark.parametrize("chunk", [1, 5])
def test_a_prompt_in_chunks_and_tokens_one_by_one_read_as_at_once(beside, chunk):
    gates, ids = gates_with(beside, family="llama"), tokens(2, 18, seed=3)
    found = []
    for prefill, first in ((None, 18), (chunk, 18), (chunk, 13), (None, 13)):
        config = CacheConfig(budget=Budget(6), prefill_chunk=prefill)
        with evicting(model_of(), Full(), config, gates=gates, extra_collectors=("gate",)) as cache:
            told = Conversation(model_of(), cache)
            told.feed(ids[:, :first])
            for t in range(first, 18):
                told.feed(ids[:, t, None])
            found.append(torch.stack([layer.state().log_beta for layer in cache.evicting_layers]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-4)


def test_text_heard_goes_on_over_evictions_forks_rows_and_disk(tmp_path):
    gates, ids = gates_with("all", family="llama"), tokens(3, 24, seed=3)
    config = CacheConfig(budget=Budget(4))
    with evicting(model_of(), DBTrimKV(), config, gates=gates) as cache:
        told = Conversation(model_of(), cache)
        told.feed(ids[:, :15])
        heard = [layer.heard.clone() for layer in cache.evicting_layers]
        assert all(x.shape == (3, 64) and x.abs().max() > 0 for x in heard)
        cache.save(tmp_path / "conversation")
        fork, mask = cache.fork(), told.mask
        told.feed(ids[:, 15:])
        expected = [read_back(layer) for layer in cache.evicting_layers]
        assert all(torch.equal(a, b.heard) for a, b in zip(heard, fork.evicting_layers, strict=True))
        fork.reorder_cache(torch.tensor([2, 0, 1]))
        other = Conversation(model_of(), fork)
        other.mask = mask
        other.feed(ids[[2, 0, 1], 15:])
        turned = [read_back(layer) for layer in fork.evicting_layers]
        assert fork.tensors()["statistics"]
        fork.reset()
        assert all(layer.heard is None for layer in fork.evicting_layers)
    with evicting(model_of(), DBTrimKV(), config, gates=gates) as cache:
        cache.restore(tmp_path / "conversation")
        again = Conversation(model_of(), cache)
        again.mask = mask
        again.feed(ids[:, 15:])
        restored = [read_back(layer) for layer in cache.evicting_layers]
    for one, two, three in zip(expected, restored, turned, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[[2, 0, 1]], three, rtol=1e-4, atol=1e-5)


def test_only_gates_that_listen_carry_text():
    with evicting(
        model_of(), DBTrimKV(), CacheConfig(budget=Budget(4)), gates=gates_with("budget", family="llama")
    ) as c:
        Conversation(model_of(), c).feed(tokens(2, 12))
        assert all(layer.heard is None for layer in c.evicting_layers)
        assert c.bytes().physical["scores"] == 2 * LAYERS * KV_HEADS * 4 * 8


@every_kind
def test_half_lives_grow_with_the_budget_by_the_formula(kind):
    gates = gates_with("budget", kind, fresh=True)
    hidden = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1))
    at = [gates.score(0, hidden, budget=torch.tensor([m])) for m in (2.0, 4.0, 32.0**0.5, 8.0, 16.0, 64.0)]
    assert all((b > a).all() for a, b in pairwise(at))
    assert torch.equal(at[2], gates.score(0, hidden)), "the reference is the geometric mean"
    grown = torch.nn.functional.softplus(torch.tensor(-4.0))
    torch.testing.assert_close(at[4] - at[0], grown.expand_as(at[0]), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(at[3] - at[1], (grown / 3).expand_as(at[0]), rtol=1e-2, atol=1e-4)


def test_another_reference_moves_where_scores_are_plain():
    config = Trim(**RANGE, budget_ref=4.0)
    coordinate = config.coordinate(torch.tensor([2.0, 4.0, 32.0]))
    torch.testing.assert_close(coordinate, torch.tensor([-1 / 3, 0.0, 1.0]))
    assert Trim().coordinate(torch.tensor([2.0])) is None


def test_forks_of_one_prefill_each_read_their_own_budget():
    """What a fork at a budget keeps is what a prefill under that budget would have kept."""
    gates, batch = gates_with("budget"), inputs_of("llava", LENGTHS)
    model, kept = model_of("llava"), []
    with prefilled(gates, batch, CacheConfig()) as cache, torch.no_grad():
        model(**batch, past_key_values=cache)
        for budget in (Budget(3), Budget(0.5, "fraction")):
            fork = cache.fork(DBTrimKV(), CacheConfig(budget=budget))
            resolved = fork.budgets().float()
            state = fork.evicting_layers[1].state()
            stored = fork.evicting_layers[1].store.gate_outputs()
            u = gates.config.coordinate(resolved)
            by_hand = torch.nn.functional.logsigmoid(stored[..., 0] + stored[..., 1] * u[:, None, None])
            torch.testing.assert_close(state.log_beta, by_hand)
            fork.evict()
            kept.append(fork.kept_table())
    for budget, table in zip((Budget(3), Budget(0.5, "fraction")), kept, strict=True):
        with evicting(model, DBTrimKV(), CacheConfig(budget=budget), gates=gates) as cache, torch.no_grad():
            model(**batch, past_key_values=cache)
            assert torch.equal(cache.kept_table(), table)


def test_the_tilt_changes_who_stays_with_the_budget():
    """Ranks at one budget differ between gates read at another: the budget is really read."""
    gates, batch = gates_with("budget"), inputs_of("llava", LENGTHS)
    low, high = (read(gates, batch, budget=torch.tensor([m, m])).log_beta[0] for m in (2.0, 16.0))
    assert not torch.equal(low.argsort(-1), high.argsort(-1))


def test_the_embedding_tells_vision_from_text():
    gates, batch = gates_with("modality"), inputs_of("llava", LENGTHS)
    visual = batch["input_ids"] == IMAGE_TOKEN
    before = read(gates, batch).log_beta[0]
    moved = copy.deepcopy(gates)
    moved.stack.grounding[0].modality[1] += 1.0
    changed = (read(moved, batch).log_beta[0] - before).abs() > 1e-6
    assert torch.equal(changed.any(1), visual)


def test_the_step_draws_its_budget_before_the_student_runs():
    objective, gates = Distillation(budget="2-16"), gates_with("budget").requires_grad_(True)
    from retention.objectives.base import Step
    from retention.training.module import collect

    batch = inputs_of("llava", LENGTHS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    step = Step(labels, torch.Generator().manual_seed(3))
    collected = collect(model_of("llava"), gates, objective, batch, step)
    expected = objective.draw_budget(torch.tensor(LENGTHS), torch.Generator().manual_seed(3))
    assert torch.equal(step.budget, expected)
    assert torch.equal(collected.log_beta[0].detach(), read(gates, batch, budget=expected).log_beta[0])
    _, figures = objective.loss(collected)
    assert figures["budget"] == expected.mean()


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Trim(modality="token"), "gate.modality none or embedding, got 'token'"),
        (lambda: PerHead(text_prior=True), "no gate.modality and gate.text_prior for gate=per_head"),
        (lambda: PerHead(budget_conditioned=True), "gate.budget_conditioned for trim or dbtrim, got 'per_head'"),
        (lambda: FastKVzip(budget_conditioned=True), "gate.budget_conditioned for trim or dbtrim, got 'fastkvzip'"),
        (lambda: Trim(budget_min=8.0, budget_max=8.0), "gate.budget_max above gate.budget_min"),
        (lambda: Trim(budget_ref=0.0), "gate budgets above 0"),
        (
            lambda: TrainConfig(gate=Trim(budget_conditioned=True), objective=KVzap()),
            "needs an objective that draws budgets, got kvzap; use objective=distillation",
        ),
    ],
)
def test_what_a_gate_cannot_read_is_refused(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


def test_artefacts_from_before_still_load():
    old = {"name": "trim", "gate_hidden": 8, "init_half_life": 10.0}
    assert gate_from_dict(old) == Trim(gate_hidden=8, init_half_life=10.0)
    assert set(asdict(Trim())) > {"budget_conditioned", "modality", "text_prior"}
