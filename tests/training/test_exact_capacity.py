"""objective.queries=0: the capacity at all positions, which sampled ones estimate."""

import pytest
import torch

from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.ops.capacity import naive_expected_size
from retention.training.module import collect
from tests.attach.helpers import inputs_of
from tests.cache.helpers import gates_of, model_of

LENGTHS, BUDGET = [24, 9], 6


def capacity(queries, seed=0, **more):
    inputs = inputs_of("llama", LENGTHS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    objective = Distillation(budget=str(BUDGET), queries=queries, **more)
    with torch.no_grad():
        seen = collect(model_of(), gates_of(), objective, inputs, Step(labels, torch.Generator().manual_seed(seed)))
        return objective.loss(seen), seen


@pytest.mark.parametrize("scope", ["global", "local"])
def test_it_is_the_mean_over_all_eligible_positions(scope):
    (terms, figures), seen = capacity(0, scope=scope)
    expected = []
    for row, length in enumerate(LENGTHS):
        own = torch.stack([x[row, :, -length:] for x in seen.log_beta])
        sizes = naive_expected_size(own, torch.arange(length))
        if scope == "global":
            sizes = sizes.mean((0, 1), keepdim=True)
        at = torch.arange(BUDGET, length)
        excess = (sizes[..., at] - BUDGET).clamp(min=0) / (at + 1 - BUDGET)
        expected.append(excess.mean())
    total, count = terms.terms["capacity"]
    assert float(count) == 2
    assert float(total) == pytest.approx(float(sum(expected)), rel=1e-5)
    assert float(total) > 0
    last = [naive_expected_size(torch.stack([x[r, :, -n:] for x in seen.log_beta]), torch.arange(n))[..., -1] for r, n in enumerate(LENGTHS)]  # fmt: skip
    assert float(figures["retained"]) == pytest.approx(float(torch.stack(last).mean()), rel=1e-5)


def test_it_draws_nothing_and_sampled_queries_estimate_it():
    exact = float(capacity(0)[0][0].terms["capacity"][0])
    assert float(capacity(0, seed=5)[0][0].terms["capacity"][0]) == exact
    drawn = [float(capacity(4, seed=seed)[0][0].terms["capacity"][0]) for seed in range(60)]
    assert len(set(drawn)) > 1
    assert sum(drawn) / len(drawn) == pytest.approx(exact, rel=0.03)


def test_the_warning_and_the_record_depend_on_it(caplog):
    Distillation(capacity_reduction="active_mean", queries=0)
    assert not caplog.text
    assert Distillation(queries=0).describe()["reduction"] == "mean over all queries"
    assert Distillation().describe()["reduction"] == "mean over sampled queries"
    Distillation(capacity_reduction="active_mean")
    assert "biased where queries are sampled" in caplog.text
    with pytest.raises(ValueError, match=r"objective\.queries of at least 1, or 0 for all, got -1"):
        Distillation(queries=-1)
