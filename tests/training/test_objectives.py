"""The objectives beside distillation: targets against written-out twins, gradients, learning, artefacts, policies."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.gates import GATES, RetentionGates
from retention.objectives import OBJECTIVES
from retention.objectives.base import GatedCall, Step
from retention.objectives.dms import DMS
from retention.objectives.duo_attention import DuoAttention
from retention.objectives.fastkvzip import FastKVzip
from retention.objectives.kvzap import KVzap
from retention.objectives.locret import Locret
from retention.ops.decay import log_beta_from_score, score_from_log_beta
from retention.policies import POLICIES, policy_of
from retention.training.module import collect
from tests.attach.helpers import inputs_of
from tests.cache.helpers import KV_HEADS, LAYERS, Conversation, model_of, tokens

LENGTHS = [24, 17]
PEERS = {
    "kvzap": KVzap(),
    "fastkvzip": FastKVzip(),
    "locret": Locret(),
    "dms": DMS(window=3, ratio=4.0, ramp=0.5),
    "duo_attention": DuoAttention(sinks=1, recent_size=4),
}
FITTED = ("kvzap", "fastkvzip", "locret")
every_peer = pytest.mark.parametrize("name", PEERS)
every_fit = pytest.mark.parametrize("name", FITTED)


def gates_for(name, family="llama", seed=0, gate=None):
    objective = PEERS[name]
    torch.manual_seed(seed)
    gates = RetentionGates.for_model(GATES[gate or objective.gate or "trim"](gate_hidden=8), model_of(family))
    gates.start_at(objective.initial_score)
    gates.training_record = objective.describe()
    return gates


def batch(family="llama", seed=0):
    """Prompts whose last tokens are scored."""
    inputs = inputs_of(family, LENGTHS, seed=seed)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    return inputs, labels


def collected(name, gates, family="llama", done=1.0, seed=0, objective=None):
    inputs, labels = batch(family)
    step = Step(labels, torch.Generator().manual_seed(seed), done)
    return collect(model_of(family), gates, objective or PEERS[name], inputs, step)


def loss_of(name, gates, **more):
    return PEERS[name].loss(collected(name, gates, **more))[0].loss()


@every_peer
@pytest.mark.parametrize("family", ["llama", "qwen3", "llava"])
def test_gradients_reach_every_gate_and_no_backbone(name, family):
    gates = gates_for(name, family)
    if name == "dms":
        gates.start_at(0.0)
    loss_of(name, gates, family=family).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.parameters())
    assert all(p.grad is None for p in model_of(family).parameters())


@every_peer
def test_the_loss_falls(name):
    gates = gates_for(name)
    optimiser = torch.optim.Adam(gates.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        loss = loss_of(name, gates)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.9 * losses[0]


class Watched:
    """One plain forward, with every layer's call as the objective sees it."""

    def __init__(self, family="llama", seed=0):
        self.calls, self.labels = [], batch(family)[1]
        peer, outer = replace(PEERS["kvzap"]), self

        class Watching(type(peer)):
            def attend(self, call, step):
                outer.calls.append(call)
                return None, None

        inputs, labels = batch(family)
        collect(model_of(family), gates_for("kvzap", family), Watching(), inputs, Step(labels, torch.Generator()))


def naive_targets(name, call: GatedCall, asking):
    """Token by token, head by head, with the whole row of logits written out."""
    rows, heads, count, width = call.queries.shape
    groups = heads // KV_HEADS
    found = torch.full((rows, KV_HEADS, count), float("-inf"), dtype=torch.double)
    for row in range(rows):
        for head in range(heads):
            kv = head // groups
            keys, values = call.keys[row, kv].double(), call.values[row, kv].double()
            weight = call.output[:, head * width : (head + 1) * width].double()
            for t in torch.nonzero(asking[row]).flatten().tolist():
                logits = call.scaling * keys @ call.queries[row, head, t].double()
                seen = call.valid[row] & (torch.arange(count) <= t)
                attention = logits.masked_fill(~seen, float("-inf")).softmax(-1)
                for i in torch.nonzero(seen).flatten().tolist():
                    if i == t:
                        continue
                    y = {
                        "locret": logits[i],
                        "fastkvzip": attention[i],
                        "kvzap": (
                            attention[i] * (weight @ values[i]).norm() / call.hidden[row, t].double().norm()
                        ).log(),
                    }[name]
                    found[row, kv, i] = torch.maximum(found[row, kv, i], y)
    return found


@every_fit
@pytest.mark.parametrize("queries", ["later", "answers"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_targets_are_the_written_out_ones(name, queries, family, monkeypatch):
    monkeypatch.setattr("retention.ops.received.BLOCK", 5)
    watched, objective = Watched(family), replace(PEERS[name], queries=queries)
    call = watched.calls[1]
    asking = objective.asking(watched.labels, call.valid)
    assert asking.sum(1).tolist() == (LENGTHS if queries == "later" else [3, 3])
    with torch.no_grad():
        target = objective.target(call, asking)
    truth = naive_targets(name, call, asking)
    known = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(target), known)
    assert known.any()
    torch.testing.assert_close(target.double()[known], truth[known], rtol=1e-4, atol=1e-5)


@every_fit
def test_the_regression_is_the_mean_over_known_tokens(name):
    gates, objective = gates_for(name), PEERS[name]
    seen = collected(name, gates)
    terms, figures = objective.loss(seen)
    score, target = torch.stack(seen.score).detach(), torch.stack(seen.noted)
    known = torch.isfinite(target)
    assert not (known & ~seen.valid[None, :, None]).any()
    s, y = score[known], target[known]
    truth = {
        "kvzap": ((s - y) ** 2).mean(),
        "locret": torch.where((s - y).abs() < 1, (s - y) ** 2 / 2, (s - y).abs() - 0.5).mean(),
        "fastkvzip": -(y * s.sigmoid().log() + (1 - y) * (1 - s.sigmoid()).log()).mean(),
    }[name]
    assert terms.means()["regression"].item() == pytest.approx(truth.item(), rel=1e-4)
    assert figures["score"].item() == pytest.approx(s.mean().item(), rel=1e-4)


def test_padding_changes_neither_loss_nor_gradient():
    for name in ("kvzap", "fastkvzip", "locret", "duo_attention"):
        grads = []
        for rows in (slice(0, 2), slice(1, 2)):
            gates = gates_for(name)
            inputs, labels = batch()
            inputs = {k: v[rows] for k, v in inputs.items()}
            if rows.start:
                real = inputs["attention_mask"][0].bool()
                inputs, labels = {k: v[:, real] for k, v in inputs.items()}, labels[rows][:, real]
            step = Step(labels[-1:] if rows.start else labels[rows], torch.Generator())
            if not rows.start:
                step.labels = labels.clone()
                step.labels[0] = -100
            seen = collect(model_of(), gates, PEERS[name], inputs, step)
            if not rows.start:
                seen.noted = [torch.cat([torch.full_like(x[:1], float("nan")), x[1:]]) for x in seen.noted]
                seen.valid = seen.valid.clone()
                seen.valid[0] = False
            loss = PEERS[name].loss(seen)[0].loss()
            loss.backward()
            grads.append((loss.item(), [p.grad for p in gates.parameters()]))
        assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-4)
        for a, b in zip(grads[0][1], grads[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_locret_pays_for_scores_that_jump_along_the_sequence():
    gates = gates_for("locret")
    seen = collected("locret", gates)
    total = count = 0.0
    for score in seen.score:
        for row, length in enumerate(LENGTHS):
            steps = score[row, :, -length:].detach().double().diff(dim=-1)
            total, count = total + float((steps**2).sum()), count + steps.numel()
    assert PEERS["locret"].loss(seen)[0].means()["smoothness"].item() == pytest.approx(total / count, rel=1e-4)


def test_dms_closes_by_noisy_decisions_and_pays_below_its_ratio():
    gates = gates_for("dms")
    gates.start_at(0.0)
    for done, ratio in ((0.0, 1.0), (0.25, 2.5), (1.0, 4.0)):
        seen = collected("dms", gates, done=done)
        closed = torch.stack(seen.noted) < math.log(0.5)
        share = torch.stack([closed[:, row, :, -length:].float().mean() for row, length in enumerate(LENGTHS)])
        hinge = (1 - 1 / ratio - share).clamp(min=0).mean()
        assert PEERS["dms"].loss(seen)[0].means()["ratio"].item() == pytest.approx(hinge.item(), abs=1e-5)
    first, again, other = (collected("dms", gates, seed=seed).noted[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("name", "score"), [("dms", 60.0), ("duo_attention", 60.0)])
def test_gates_that_keep_everything_leave_the_model_as_it_is(name, score):
    gates = gates_for(name)
    gates.start_at(score)
    seen = collected(name, gates)
    real = seen.valid
    torch.testing.assert_close(seen.student[real], seen.teacher[real], rtol=1e-4, atol=1e-4)


def test_duo_attention_without_full_heads_streams():
    """Every head sees sinks and recent tokens only: the model with the others masked."""
    gates = gates_for("duo_attention")
    gates.start_at(-60.0)
    ids = tokens(1, 20)
    step = Step(torch.full_like(ids, -100), torch.Generator())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = collect(model_of(), gates, PEERS["duo_attention"], inputs, step)
    ages = torch.arange(20)[:, None] - torch.arange(20)
    mask = (ages >= 0) & ((ages < 4) | (torch.arange(20) < 1))
    bias = torch.zeros(1, 1, 20, 20).masked_fill(~mask, torch.finfo(torch.float).min)
    with torch.no_grad():
        truth = model_of().get_decoder()(input_ids=ids, attention_mask=bias, use_cache=False).last_hidden_state
    torch.testing.assert_close(seen.student, truth, rtol=1e-4, atol=1e-4)


@every_peer
def test_gates_survive_their_artefact_and_name_their_objective(name, tmp_path):
    gates = gates_for(name)
    gates.save_pretrained(tmp_path / "gates")
    again = RetentionGates.from_pretrained(tmp_path / "gates")
    assert (again.objective, again.decays) == (name, False)
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        assert all(torch.equal(again(i, x), gates(i, x)) for i in range(LAYERS))
    assert f"objective {name}" in (tmp_path / "gates" / "README.md").read_text()


@every_peer
def test_a_policy_refuses_gates_of_another_objective_in_one_sentence(name):
    gates = gates_for(name)
    gates.check_objective(name, name)
    for other in set(OBJECTIVES) - {name}:
        with pytest.raises(ValueError, match=f"policy p ranks by gates trained with objective {other}, .*with {name};"):
            gates.check_objective(other, "p")


def test_every_objective_has_a_policy_that_ranks_by_its_gates():
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        assert POLICIES[policy_of(objective.ranked_as or name)]().needs_gates
    assert not POLICIES["knorm"]().needs_gates
    assert RetentionGates.for_model(GATES["trim"](), model_of()).objective == "distillation"


def kept_by(name, gates, budget, **changes):
    """What stays of one prompt, [layers, heads, positions], and the scores that should decide."""
    from retention import evicting

    ids, scores = tokens(1, 20), []
    config = CacheConfig(Budget(float(budget)), **changes)
    with evicting(model_of(), POLICIES["full"](), gates=gates, extra_collectors=("gate",)) as cache:
        Conversation(model_of(), cache).feed(ids)
        scores = torch.stack([score_from_log_beta(layer.state().log_beta)[0] for layer in cache.evicting_layers])
        fork = cache.fork(POLICIES[name](), config)
        fork.evict()
        return fork.kept_table()[:, 0], scores


def spread(name):
    """Gates whose scores differ from token to token, ages aside."""
    gates = gates_for(name)
    if name != "duo_attention":
        for parameter in gates.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return gates.requires_grad_(False)


@pytest.mark.parametrize("name", ["kvzap", "fastkvzip", "dms"])
def test_the_pool_keeps_the_highest_scores(name):
    kept, scores = kept_by(name, spread(name), 5)
    assert kept.sum() == 5 * LAYERS * KV_HEADS
    assert scores[kept].min() >= scores[~kept].max()


def test_locret_keeps_the_highest_scores_of_each_head():
    kept, scores = kept_by("locret", spread("locret"), 5)
    assert (kept.sum(-1) == 5).all()
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            mask = kept[layer, head]
            assert scores[layer, head][mask].min() >= scores[layer, head][~mask].max()


@pytest.mark.parametrize(("name", "threshold"), [("kvzap", -4.0), ("dms", 0.0)])
def test_a_threshold_compares_with_the_score_as_trained(name, threshold):
    gates = spread(name)
    gates.start_at(threshold)
    kept, scores = kept_by(name, gates, 4, selector="threshold", threshold=threshold)
    assert torch.equal(kept, scores >= threshold)
    assert 0 < kept.float().mean() < 1


def test_duo_attention_gives_whole_heads_what_sinks_and_recent_tokens_leave():
    gates = spread("duo_attention")
    for layer, values in enumerate(((0.0, 3.0), (2.0, -1.0), (-2.0, -3.0))):
        gates.stack.layers[layer].offset.data.copy_(torch.tensor(values))
    kept, _ = kept_by("duo_attention", gates, 11)
    base = 4 + 3
    assert kept[..., :4].all()
    assert kept[..., -3:].all()
    assert kept.sum(-1).tolist() == [[base, 20], [6 * 11 - 20 - 4 * base + 0, base], [base, base]]


def test_scores_come_back_from_log_beta():
    score = torch.tensor([-60.0, -4.0, -0.1, 0.0, 0.3, 9.0, 40.0, 80.0])
    torch.testing.assert_close(score_from_log_beta(log_beta_from_score(score)), score, rtol=1e-5, atol=1e-6)
    assert score_from_log_beta(log_beta_from_score(torch.tensor(200.0))).item() == pytest.approx(85.2, abs=0.1)


def test_the_low_rank_gate_is_the_written_out_one():
    gates = gates_for("fastkvzip", gate="fastkvzip").requires_grad_(False)
    own, x = gates.stack.layers[0], torch.randn(1, 3, 64)
    rank, groups = 8, 4 // KV_HEADS

    def normed(v):
        return v / (v.pow(2).mean() + torch.finfo(torch.float).eps).sqrt()

    for token in range(3):
        q, k = own.query(x[0, token]).view(4, rank), own.key(x[0, token]).view(KV_HEADS, rank)
        for kv in range(KV_HEADS):
            chances = []
            for head in range(kv * groups, (kv + 1) * groups):
                against = own.base_keys[kv] @ normed(q[head]) / rank**0.5
                own_key = normed(q[head]) @ normed(k[kv]) / rank**0.5
                c = own.offset[head] + math.log(16)
                chances.append(1 / (1 + (against - own_key - c).exp().sum()))
            expected = F.logsigmoid(torch.logit(torch.stack(chances).mean()))
            torch.testing.assert_close(gates(0, x)[0, kv, token], expected, rtol=1e-4, atol=1e-5)


def test_impossible_settings_are_refused():
    from retention.config import compose

    for sentence, overrides in (
        ("objective.queries later or answers, got 'all'", ["objective=kvzap", "objective.queries=all"]),
        ("objective.ratio of at least 1, got 0.5", ["objective=dms", "objective.ratio=0.5"]),
        ("objective.recent_size of at least 1, got 0", ["objective=duo_attention", "objective.recent_size=0"]),
        ("duo_attention trains gate=per_head only, got gate=trim", ["objective=duo_attention", "gate=trim"]),
    ):
        with pytest.raises(ValueError, match=sentence):
            compose("train", overrides)


ROOT = Path(__file__).parents[2]
SMALL = ["task.n_images=4", "task.n_needles=12", "task.n_asked=6", "task.n_turns=4"]


@pytest.mark.usefixtures("unrendered")
def test_the_command_line_trains_exports_evaluates_and_refuses(tmp_path):
    from retention.config import compose
    from retention.evaluation.run import run as evaluate
    from retention.training.run import run as train

    overrides = ["trainer=smoke", "data.batch_size=2", "data.val_examples=2", "data.n_turns=4", *SMALL, "logger=csv"]
    gates = train(compose("train", [*overrides, "objective=kvzap", "gate=trim", f"output_dir={tmp_path / 'run'}"]))
    told = json.loads((gates / "gate_config.json").read_text())["training"]
    assert (told["objective"], told["score_kind"], told["queries"]) == ("kvzap", "static", "later")
    small = [word.replace("task.", "task.ask_subset.") for word in SMALL]
    cells = [f"gates={gates}", "budgets=[25%]", "examples=2", "quota_examples=2", *small]
    result = evaluate(compose("eval", [*cells, "policies=[kvzap,quota+knorm]", f"output_dir={tmp_path / 'eval'}"]))
    assert [row["policy"] for row in result.summary] == ["full", "kvzap", "quota+knorm", "random"]
    with pytest.raises(ValueError, match="policy db_trim_kv ranks by gates trained with objective distillation"):
        evaluate(compose("eval", [*cells, "policies=[db_trim_kv]", f"output_dir={tmp_path / 'other'}"]))
    command = [sys.executable, "scripts/export_gates.py", str(next(gates.parent.glob("checkpoints/*.ckpt")))]
    subprocess.run([*command, str(tmp_path / "exported")], cwd=ROOT, check=True, capture_output=True)
    assert RetentionGates.from_pretrained(tmp_path / "exported").objective == "kvzap"
