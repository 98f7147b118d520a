"""A token at a time and all at once absorb the same, by every rule and for every transition of the memory."""

import pytest
import torch

from retention.memory import Evicted
from retention.ops import recurrence
from retention.ops.recurrence import decayed_sum, delta_rule, naive_decayed_sum, naive_delta_rule
from tests.memory.test_memory import BATCH, TRAINED, drawn, layer_of, part

RULES = {"sum": (naive_decayed_sum, decayed_sum), "delta": (naive_delta_rule, delta_rule)}


def given(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    keys = torch.nn.functional.normalize(torch.randn(2, 3, count, 5, generator=g, dtype=torch.float64), dim=-1)
    values = torch.randn(2, 3, count, 4, generator=g, dtype=torch.float64)
    weights, log_eta = (
        torch.rand(2, 3, count, generator=g).double(),
        -0.3 * torch.rand(2, 3, count, generator=g).double(),
    )
    return torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64), keys, values, weights, log_eta


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_all_at_once_equals_one_by_one(rule, count, monkeypatch):
    monkeypatch.setattr(recurrence, "BLOCK", 4)
    naive, fast = RULES[rule]
    if count:
        assert (naive(*given(count)) - fast(*given(count))).abs().max() < 1e-12
    elif rule == "delta":
        assert torch.equal(fast(*given(0)), given(0)[0])


@pytest.mark.parametrize("rule", RULES)
def test_gradients_agree(rule):
    grads = []
    for how in RULES[rule]:
        inputs = [x.requires_grad_() for x in given(6)]
        how(*inputs).square().sum().backward()
        grads.append([x.grad for x in inputs])
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*grads, strict=True))


def test_the_delta_rule_overwrites_what_a_key_held():
    keys = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 1, 0])]
    values = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    state = delta_rule(torch.zeros(3, 1, dtype=torch.float64), keys, values, ones, zeros)
    assert state.flatten().tolist() == [5.0, 2.0, 0.0]


@pytest.mark.parametrize("config", TRAINED)
def test_a_memory_absorbs_token_by_token_what_it_absorbs_at_once(config):
    layer, evicted = layer_of(config), drawn(16, keep=0.8)
    with torch.no_grad():
        for name, value in (("step_bias", -6.0), ("retain_bias", 5.0), ("weight_attention", 0.7)):
            if hasattr(layer, name):
                getattr(layer, name).fill_(value)
        weight = layer.weight(evicted)
        at_once = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
        state, plain = layer.empty(BATCH, torch.device("cpu")), layer.weight
        for i in range(16):
            layer.weight = lambda _, i=i: weight[..., i : i + 1]  # roots are those of the whole image
            state = layer.absorb(state, part(evicted, slice(i, i + 1)))
        layer.weight = plain
    assert all(torch.allclose(at_once[k], state[k], atol=1e-5) for k in state)
    assert isinstance(evicted, Evicted)
    decays = config.transition != "none" and "step" in (config.text_decay, config.vision_decay)
    assert (layer.log_eta(evicted.entropy) < 0).all() == decays
