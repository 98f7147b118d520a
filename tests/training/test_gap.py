"""The gap between decay and real eviction: both numbers written out, and logged at every validation."""

import pytest
import torch
from torch.nn import functional as F

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.attach.soft import attach_gates
from retention.config import compose
from retention.data.render import Renderer
from retention.gates.dbtrim import DBTrim
from retention.models import family_of
from retention.objectives.distillation import Distillation
from retention.objectives.hard_eviction import HardEviction
from retention.policies import POLICIES
from retention.tasks.needles import Needles
from retention.training.gap import EXAMPLES, middle, soft_hard_gap
from retention.training.run import run
from tests.attach.helpers import snapshot
from tests.training.test_lagrangian import SMALL, column

TASK = Needles(n_images=3, n_needles=8, n_turns=3)


@pytest.fixture(scope="module")
def held_out(embedded_model, embedded_processor):
    renderer = Renderer(embedded_processor, family_of(embedded_model).visual_ids(embedded_model.config))
    return [TASK.example(0, "val", i, style="symbolic") for i in range(3)], renderer


def gates_with(model, half_life, conditioned=False):
    torch.manual_seed(0)
    how = {"budget_conditioned": True, "budget_min": 2.0, "budget_max": 64.0} if conditioned else {}
    gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=half_life, **how), model)
    for parameter in gates.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return gates.eval()


def written_out(model, gates, examples, renderer, budget, policy):
    """Row by row without padding: token by token into the cache, the whole softmax."""
    total = {"soft": 0.0, "hard": 0.0}
    count = 0
    for example in examples:
        batch, rendered = renderer.training_batch([example]), renderer.render([example])
        scored = batch.labels[0, 1:] != -100
        entries = Budget.parse(budget).resolve(rendered.lengths[0], num_layers=1, num_kv_heads=1, entry_bytes=1)
        with torch.no_grad():
            full = model(**batch.inputs, use_cache=False).logits[0, :-1].log_softmax(-1)
            with attach_gates(model, gates, budget=torch.tensor([float(entries)])):
                soft = model(**batch.inputs, use_cache=False).logits[0, :-1].log_softmax(-1)
            rest = batch.inputs["input_ids"][:, rendered.lengths[0] :]
            with evicting(model, POLICIES[policy](), CacheConfig(Budget.parse(budget)), gates=gates) as cache:
                model(**rendered.inputs, past_key_values=cache)
                with cache.hold():
                    steps = [
                        model(input_ids=rest[:, i : i + 1], past_key_values=cache).logits for i in range(rest.shape[1])
                    ]
        assert cache.evicted
        hard = torch.cat(steps, 1)[0, :-1].log_softmax(-1)
        late = slice(-len(hard), None)
        for name, own, part in (("soft", soft, slice(None)), ("hard", hard, late)):
            kl = F.kl_div(own, full[part], reduction="none", log_target=True).sum(-1)
            total[name] += float(kl[scored[part]].sum())
        count += int(scored.sum())
    return {name: value / count for name, value in total.items()}


@pytest.mark.parametrize(("scope", "policy"), [("global", "db_trim_kv"), ("local", "trim_kv")])
@pytest.mark.parametrize("conditioned", [False, True])
def test_both_numbers_are_the_written_out_ones(embedded_model, held_out, scope, policy, conditioned):
    examples, renderer = held_out
    gates, objective = gates_with(embedded_model, 80.0, conditioned), Distillation(budget="5%", scope=scope)
    truth = written_out(embedded_model, gates, examples, renderer, "5%", policy)
    before = snapshot(embedded_model)  # a tower's first forward leaves hooks of transformers on it
    figures = soft_hard_gap(embedded_model, gates, objective, examples, renderer)
    assert figures["gap/soft_kl"] == pytest.approx(truth["soft"], rel=1e-3, abs=1e-5)
    assert figures["gap/hard_kl"] == pytest.approx(truth["hard"], rel=1e-3, abs=1e-5)
    assert figures["gap"] == figures["gap/hard_kl"] - figures["gap/soft_kl"]
    assert snapshot(embedded_model) == before


def test_gates_that_forget_nothing_have_a_gap_that_is_all_eviction(embedded_model, held_out):
    examples, renderer = held_out
    gates = gates_with(embedded_model, 1e9)
    some = soft_hard_gap(embedded_model, gates, Distillation(budget="4"), examples, renderer)
    assert abs(some["gap/soft_kl"]) < 1e-4 < some["gap/hard_kl"]
    none = soft_hard_gap(embedded_model, gates, Distillation(budget="4000"), examples, renderer)
    assert abs(none["gap"]) < 1e-4


def test_it_stays_cheap(embedded_model, held_out, monkeypatch):
    examples, renderer = held_out
    rows = []
    monkeypatch.setattr(
        renderer, "render", lambda given: rows.append(len(given)) or type(renderer).render(renderer, given)
    )
    soft_hard_gap(embedded_model, gates_with(embedded_model, 80.0), Distillation(), examples * 4, renderer)
    assert set(rows) == {EXAMPLES}


def test_the_budget_of_a_range_is_its_geometric_middle():
    assert middle(Distillation(budget="5%")) == Budget(0.05, "fraction")
    assert middle(HardEviction(budget="4-16")) == Budget(8.0)
    assert middle(Distillation(budget="1%-4%")).amount == pytest.approx(0.02)


@pytest.mark.parametrize("objective", ["short_context", "kvzap"])
def test_runs_log_it_where_gates_decay(objective, tmp_path):
    run(compose("train", [*SMALL, f"objective={objective}", f"output_dir={tmp_path / 'run'}"]))
    names = ("gap", "gap/soft_kl", "gap/hard_kl")
    found = [column(tmp_path / "run", name) for name in names]
    assert [len(x) for x in found] == [2 if objective == "short_context" else 0] * 3
    for gap, soft, hard in zip(*found, strict=True):
        assert gap == pytest.approx(hard - soft, abs=1e-6)
