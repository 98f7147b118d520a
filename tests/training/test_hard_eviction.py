"""The second stage: simulated evictions are the cache's, gradients those of decay, and a run starts where one ended."""

import json
from dataclasses import replace

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.config import compose
from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.models.family import head_of
from retention.objectives.base import Step
from retention.objectives.hard_eviction import HardEviction
from retention.ops import evicted as ops
from retention.ops.evicted import NEVER, fates, hard_weights, soft_weights
from retention.ops.evicted_attention import evicted_attention, naive_evicted_attention
from retention.policies import POLICIES
from retention.training.initial import trained_gates
from retention.training.module import collect
from retention.training.run import run
from tests import zoo
from tests.cache.helpers import LAYERS, Conversation, gates_of, left_padded, model_of, tokens
from tests.training.test_lagrangian import SMALL

CONTEXT, LENGTH = 14, 22
POLICY = {"global": "db_trim_kv", "local": "trim_kv"}
scopes = pytest.mark.parametrize("scope", POLICY)
modes = pytest.mark.parametrize("mode", ["ste_output", "soft_mask"])


def step_of(ids, *, context=CONTEXT, done=0.0):
    labels = ids.masked_fill(torch.arange(ids.shape[1]) <= CONTEXT, -100)
    told = None if context is None else torch.full((len(ids),), context)
    return Step(labels, torch.Generator().manual_seed(0), done, context=told)


def student(objective, gates=None, ids=None, mask=None, **more):
    ids = tokens(2, LENGTH) if ids is None else ids
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    return collect(model_of(), gates or gates_of(), objective, inputs, step_of(ids, **more))


def logits(seen):
    with torch.no_grad():
        return head_of(model_of())(seen.student)


def drawn(seed=0, heads=4, kv_heads=2, count=19):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, count, 8, generator=generator) for n in (heads, kv_heads, kv_heads))
    log_beta = -torch.rand(3, 2, kv_heads, count, generator=generator)
    valid = torch.arange(count) >= torch.tensor([[0], [4]])
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    return q, k, v, log_beta, valid, positions


# --- what is kept ---------------------------------------------------------------------------------------------


@scopes
@pytest.mark.parametrize("budget", ["3", "25%", "100"])
def test_the_student_sees_what_the_cache_keeps(scope, budget):
    """A padded batch, evicted once at the end of its contexts: logits of all that follows."""
    ids, mask = left_padded(tokens(2, LENGTH), [LENGTH, LENGTH - 5])
    objective = HardEviction(budget=budget, scope=scope)
    step = step_of(ids)
    step.context = torch.tensor([CONTEXT, CONTEXT - 5])
    seen = collect(model_of(), gates_of(), objective, {"input_ids": ids, "attention_mask": mask}, step)
    with evicting(model_of(), POLICIES[POLICY[scope]](), CacheConfig(Budget.parse(budget)), gates=gates_of()) as cache:
        told = Conversation(model_of(), cache)
        told.feed(ids[:, :CONTEXT], mask[:, :CONTEXT])
        kept = cache.kept_table()
        with cache.hold():
            physical = told.feed(ids[:, CONTEXT:], mask[:, CONTEXT:])
    assert (logits(seen)[:, CONTEXT:] - physical).abs().max() < 1e-4
    for number in range(LAYERS):
        _, stays, _ = step.decided[number]
        for row, pad in enumerate((0, 5)):
            found = stays[row][:, pad:CONTEXT]
            assert torch.equal(found, kept[number, row][:, : CONTEXT - pad])


def test_eviction_again_and_again_is_the_cache_in_chunks():
    """Head by head; what tokens are after an eviction decides the next one."""
    ids = tokens(2, LENGTH)
    seen = student(HardEviction(budget="3", scope="local", evict_every=5), ids=ids)
    config = CacheConfig(Budget(3.0), prefill_chunk=5)
    with evicting(model_of(), POLICIES["trim_kv"](), config, gates=gates_of()) as cache:
        physical = Conversation(model_of(), cache).feed(ids)
    assert (logits(seen) - physical).abs().max() < 1e-4


def test_the_first_of_several_evictions_of_a_pool_is_exact():
    """Later ones rank by gates that have not seen it."""
    ids = tokens(2, LENGTH)
    seen = student(HardEviction(budget="3", evict_every=8), ids=ids)
    config = CacheConfig(Budget(3.0), prefill_chunk=8)
    with evicting(model_of(), POLICIES["db_trim_kv"](), config, gates=gates_of()) as cache:
        physical = Conversation(model_of(), cache).feed(ids)
    assert (logits(seen) - physical)[:, :16].abs().max() < 1e-4


@pytest.mark.parametrize("pooled", [True, False])
def test_fates_are_the_written_out_ones(pooled):
    _, _, _, log_beta, valid, positions = drawn()
    moments, budget = torch.tensor([[5, 9, 15], [5, 9, 0]]), torch.tensor([2, 3])
    found = fates(log_beta, positions, valid, moments, budget, pooled=pooled)
    layers, rows, heads, count = log_beta.shape
    for row in range(rows):
        alive = {(a, h, i) for a in range(layers) for h in range(heads) for i in range(count) if valid[row, i]}
        gone = {}
        for n in (x for x in moments[row].tolist() if x):
            asked = {x for x in alive if positions[row, x[2]] < n}
            groups = [asked] if pooled else [{x for x in asked if x[:2] == pair} for pair in {x[:2] for x in asked}]
            for group in groups:
                room = int(budget[row]) * (layers * heads if pooled else 1)
                order = sorted(
                    group, key=lambda x: -float((n - positions[row, x[2]]) * log_beta[x[0], row, x[1], x[2]])
                )
                for lost in order[room:]:
                    gone[lost] = n
                    alive.discard(lost)
        for a in range(layers):
            for h in range(heads):
                for i in torch.nonzero(valid[row]).flatten().tolist():
                    assert bool(found.kept[a, row, h, i]) == ((a, h, i) not in gone)
                    if (a, h, i) in gone:
                        assert int(found.since[a, row, h, i]) == gone[a, h, i]


# --- attention under it ---------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("padded", [True, False])
def test_blocks_are_the_naive_form_with_its_gradients(mode, padded, monkeypatch):
    monkeypatch.setattr("retention.ops.blocks.BLOCK", 5)
    q, k, v, log_beta, valid, positions = drawn()
    valid = valid if padded else torch.ones_like(valid)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    fate = fates(log_beta, positions, valid, torch.tensor([[6, 12], [6, 12]]), torch.tensor([2, 2]), pooled=True)
    results = []
    for function in (naive_evicted_attention, evicted_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, log_beta[0])]
        soft = soft_weights(leaves[3], positions, fate.since[0], fate.cut[0], 0.5)
        weights = soft if mode == "soft_mask" else hard_weights(fate.kept[0])
        out = function(*leaves[:3], weights, fate.since[0], scaling=0.3, positions=positions, valid=valid)
        out = out * valid[:, None, :, None]
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-5)
    assert (results[0][-1] is None) == (mode == "ste_output")


def test_the_naive_form_is_attention_with_keys_deleted():
    q, k, v, log_beta, valid, positions = drawn()
    valid = torch.ones_like(valid)
    positions = valid.cumsum(1) - 1
    fate = fates(log_beta, positions, valid, torch.tensor([[6, 12], [6, 12]]), torch.tensor([2, 2]), pooled=False)
    given = {"scaling": 0.3, "positions": positions}
    out = naive_evicted_attention(q, k, v, hard_weights(fate.kept[1]), fate.since[1], **given)
    for row in range(2):
        for head in range(4):
            kv = head // 2
            for t in range(q.shape[2]):
                left = (fate.since[1][row, kv] <= t) & ~fate.kept[1][row, kv]
                here = torch.nonzero((torch.arange(q.shape[2]) <= t) & ~left).flatten()
                weights = (0.3 * k[row, kv, here] @ q[row, head, t]).softmax(0)
                assert torch.allclose(out[row, head, t], weights @ v[row, kv, here], atol=1e-5)


def test_soft_weights_tend_to_the_hard_ones():
    _, _, _, log_beta, valid, positions = drawn()
    fate = fates(log_beta, positions, valid, torch.tensor([[9], [7]]), torch.tensor([3, 3]), pooled=True)
    near, far = (
        torch.stack([soft_weights(log_beta[i], positions, fate.since[i], fate.cut[i], heat) for i in range(3)])
        for heat in (1e-6, 1.0)
    )
    decided = fate.since < NEVER
    assert torch.allclose(near.exp(), hard_weights(fate.kept).exp(), atol=1e-4)
    assert (far[decided] < 0).all()
    assert not far[~decided].any()
    assert ((far.exp() > 0.5) == fate.kept)[decided].all()


def test_nothing_is_decided_where_everything_fits():
    _, _, _, log_beta, valid, positions = drawn()
    fate = fates(log_beta, positions, valid, torch.tensor([[9], [0]]), torch.tensor([50, 1]), pooled=True)
    assert fate.kept.all()
    assert not soft_weights(log_beta[0], positions, fate.since[0], fate.cut[0], 0.1).any()
    assert ops.NEVER > 2**40


# --- the objective --------------------------------------------------------------------------------------------


def fresh(seed=0):
    torch.manual_seed(seed)
    gates = RetentionGates.for_model(Trim(gate_hidden=8, init_half_life=10.0), model_of())
    for name, parameter in gates.named_parameters():
        if "offset" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return gates


@modes
@scopes
def test_gradients_reach_every_gate_and_no_backbone(mode, scope):
    gates, objective = fresh(), HardEviction(budget="4", scope=scope, hard_mode=mode, capacity_weight=0.0)
    objective.loss(student(objective, gates))[0].loss().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.parameters())
    assert all(p.grad is None for p in model_of().parameters())


def test_the_gradient_of_the_straight_path_is_that_of_decay():
    """One layer's attention: the value of the hard one, the derivative of the soft one."""
    from retention.objectives.base import decaying

    calls = []

    class Watching(HardEviction):
        def attend(self, call, step):
            calls.append((call, step))
            return super().attend(call, step)

    objective = Watching(budget="3", scope="local")
    student(objective)
    call, step = calls[1]
    leaf = call.log_beta.detach().requires_grad_()
    call = replace(call, log_beta=leaf)
    out, _ = objective.attend(call, step)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (straight,) = torch.autograd.grad((out * upstream).sum(), leaf)
    (soft,) = torch.autograd.grad((decaying(call, leaf) * upstream).sum(), leaf)
    assert torch.equal(straight, soft)
    since, kept, _ = step.decided[call.layer]
    given = {"scaling": call.scaling, "positions": call.positions}
    hard = naive_evicted_attention(call.queries, call.keys, call.values, hard_weights(kept), since, **given)
    assert torch.allclose(out, hard, atol=1e-6)
    dropped = ~kept & (call.positions > 0)[:, None]
    assert straight[dropped].abs().min() > 0


@modes
def test_layers_run_again_decide_the_same(mode):
    grads = []
    for recompute in (False, True):
        gates, objective, ids = fresh(), HardEviction(budget="4", hard_mode=mode), tokens(2, LENGTH)
        seen = collect(model_of(), gates, objective, {"input_ids": ids}, step_of(ids), recompute=recompute)
        objective.loss(seen)[0].loss().backward()
        grads.append([p.grad for p in gates.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*grads, strict=True))


@modes
def test_the_loss_falls(mode):
    gates, objective, losses = fresh(), HardEviction(budget="4", hard_mode=mode), []
    optimiser = torch.optim.Adam(gates.parameters(), lr=0.03)
    for number in range(25):
        loss = objective.loss(student(objective, gates, done=number / 25))[0].loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.95 * losses[0]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3_vl", "qwen3_next"])
def test_families_train(name):
    """Capped logits, attention inside images, three-axis positions, layers that cannot be evicted."""
    (model, _), inputs = zoo.loaded(name), zoo.batch(name, images=name not in zoo.TEXT)
    torch.manual_seed(0)
    gates, objective = (
        RetentionGates.for_model(Trim(gate_hidden=8, init_half_life=20.0), model),
        HardEviction(budget="3"),
    )
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, : labels.shape[1] - 4] = -100
    seen = collect(model, gates, objective, inputs, Step(labels, torch.Generator().manual_seed(0)))
    objective.loss(seen)[0].loss().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gates.parameters())
    assert (seen.student - seen.teacher)[seen.valid].abs().max() > 1e-3


def test_budgets_are_whole_entries_of_what_is_evicted():
    ids = tokens(2, LENGTH)
    assert student(HardEviction(budget="25%"), ids=ids).step.budget.tolist() == [4.0, 4.0]  # 3.5 up
    assert student(HardEviction(budget="25%", evict_every=4), ids=ids).step.budget.tolist() == [6.0, 6.0]
    assert student(HardEviction(budget="5"), ids=ids).step.budget.tolist() == [5.0, 5.0]
    unsaid = student(HardEviction(budget="20%"), ids=ids, context=None)
    assert unsaid.step.budget.tolist() == [3.0, 3.0]  # of the 15 tokens before the first label
    scored, step = HardEviction(budget="20%"), Step(ids, torch.Generator().manual_seed(0))
    plain = collect(model_of(), gates_of(), scored, {"input_ids": ids}, step)
    assert step.budget.tolist() == [4.0, 4.0]
    torch.testing.assert_close(plain.student, plain.teacher, rtol=1e-4, atol=1e-4)


def test_temperatures_fall_by_a_constant_factor():
    objective = HardEviction(hard_mode="soft_mask")
    heats = [objective.heat(done) for done in (0.0, 0.5, 1.0)]
    assert heats == pytest.approx([1.0, 0.05**0.5, 0.05])


@pytest.mark.parametrize(("sentence", "given"), [
    ("objective.hard_mode ste_output or soft_mask, got 'none'", {"hard_mode": "none"}),
    ("objective.evict_every of at least 1, or null, got 0", {"evict_every": 0}),
    ("temperatures above 0 that do not rise", {"temperature": 0.01}),
])  # fmt: skip
def test_wrong_settings_are_refused(sentence, given):
    with pytest.raises(ValueError, match=sentence):
        HardEviction(**given)


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    return run(compose("train", [*SMALL, f"output_dir={tmp_path_factory.mktemp('first') / 'run'}"]))


def second(first_stage, *more):
    return compose("train", [*SMALL, "objective=hard_eviction_short_context", f"init_gates={first_stage}", *more])


@modes
def test_a_run_goes_on_from_trained_gates(first_stage, mode, tmp_path, monkeypatch):
    starts = []

    def watching(*given):
        gates = trained_gates(*given)
        starts.append({name: x.clone() for name, x in gates.tensors().items()})
        return gates

    monkeypatch.setattr("retention.training.run.trained_gates", watching)
    artefact = run(second(first_stage, f"objective.hard_mode={mode}", f"output_dir={tmp_path / 'run'}"))
    before = RetentionGates.from_pretrained(first_stage)
    after = RetentionGates.from_pretrained(artefact)
    assert all(torch.equal(starts[0][name], x) for name, x in before.tensors().items())
    assert not all(torch.equal(after.tensors()[name], x) for name, x in before.tensors().items())
    told = json.loads((artefact / "gate_config.json").read_text())["training"]
    assert (told["objective"], told["stage"], told["hard_mode"]) == ("distillation", "hard_eviction", mode)
    assert told["went_on_from"]["gates"] == str(first_stage)
    after.check_objective("distillation", "db_trim_kv")


def test_gates_that_do_not_fit_are_refused(first_stage, tmp_path):
    for sentence, more in (
        ("expected init_gates of gate.gate_hidden 14, got", ["gate.gate_hidden=14"]),
        ("expected init_gates of gate.name trim, got dbtrim", ["gate=trim"]),
        ("expected init_gates trained with objective kvzap, got some of distillation", ["objective=kvzap"]),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(second(first_stage, *more, f"output_dir={tmp_path / more[0].partition('=')[2]}"))
    with pytest.raises(ValueError, match="a memory is trained on frozen gates alone"):
        second(first_stage, "memory=slots")


def test_new_gates_are_warned_of(tmp_path, caplog):
    run(compose("train", [*SMALL, "objective=hard_eviction_short_context", f"output_dir={tmp_path / 'run'}"]))
    assert "objective=hard_eviction is meant for trained gates; name some with init_gates" in caplog.text
