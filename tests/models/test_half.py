"""The identities of every family in bfloat16, on a CPU and (with `-m gpu`) on a CUDA device.

Tolerances are of the largest logit: bfloat16 has eight significant bits, and gated attention is computed in float32
where the base rounds. On one NVIDIA card or another the same bounds are to hold.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.attach.soft import attach_gates
from retention.gates.dbtrim import DBTrim
from retention.objectives.base import Step
from retention.objectives.distillation import Distillation
from retention.policies import POLICIES
from retention.training.module import collect
from tests import zoo
from tests.cache.helpers import small
from tests.cache.truth import Hiding

MEDIAN, WORST = 0.04, 0.2
"""Difference of the logits of a token, of half the tokens and of any, where attention is computed in another order."""
ROUTED = ("qwen3_moe", "qwen3_next", "qwen3_vl_moe")
"""Where rounding may send a single token to another expert, so that only the median token is compared."""
everywhere = pytest.mark.parametrize(("name", "device"), [
    *((name, "cpu") for name in ("llama", "gemma2", "qwen2_5_vl", "gemma3")),
    *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in zoo.EVERY),
])  # fmt: skip


def placed(name, device):
    """Model and a padded batch on a device, in bfloat16."""
    model = copy.deepcopy(zoo.loaded(name)[0]).to(device, torch.bfloat16)
    inputs = zoo.positioned(name, zoo.batch(name, images=name not in zoo.TEXT))
    moved = {k: v.to(device, torch.bfloat16) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        gates = RetentionGates.for_model(DBTrim(gate_hidden=8, init_half_life=20.0), model)
    return model, moved, gates


def close(name, got, expected, real):
    """Whether logits agree at real tokens, by the largest logit."""
    real = real.bool()
    difference = (got.float() - expected.float()).abs().amax(-1)[real] / expected.float().abs()[real].max()
    return float(difference.median()) < MEDIAN and (name in ROUTED or float(difference.max()) < WORST)


@everywhere
def test_gates_that_never_forget_are_the_base(name, device):
    model, inputs, gates = placed(name, device)
    for key, parameter in gates.named_parameters():
        torch.nn.init.constant_(parameter, 1e4 if "offset" in key else 0.0)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        with attach_gates(model, gates):
            got = model(**inputs, use_cache=False).logits
    assert close(name, got, expected, inputs["attention_mask"])


@everywhere
def test_a_budget_beyond_the_context_is_the_full_cache(name, device):
    """The same tokens fed to both, so that a rounded tie does not lead them apart."""
    model, inputs, gates = placed(name, device)
    stock, mask = DynamicCache(config=model.config.get_text_config()), inputs["attention_mask"]
    with evicting(model, POLICIES["db_trim_kv"](), CacheConfig(Budget(512.0)), gates=gates) as cache, torch.no_grad():
        part = inputs
        for step in range(4):
            got, expected = (model(**part, past_key_values=c, use_cache=True).logits for c in (cache, stock))
            assert close(name, got, expected, part["attention_mask"][:, -got.shape[1] :]), step
            ids = expected[:, -1:].argmax(-1)
            part = {"input_ids": ids, **zoo.following(name, mask, 1, cache.rope_deltas)}
            mask = part["attention_mask"]


@everywhere
def test_a_quarter_equals_the_hidden_full_cache(name, device):
    model, inputs, gates = placed(name, device)
    generator = torch.Generator().manual_seed(0)
    for policy in ("db_trim_kv", "snapkv"):
        oracle, part = Hiding(model), inputs
        mask = inputs["attention_mask"]
        with (
            evicting(model, small(policy), CacheConfig(Budget(0.25, "fraction")), gates=gates) as cache,
            torch.no_grad(),
        ):
            for new in (1, 5, 1, 0):
                got = model(**part, past_key_values=cache, use_cache=True).logits
                assert close(name, got, oracle.feed(**part), part["attention_mask"][:, -got.shape[1] :])
                oracle.drop(cache)
                if new:
                    ids = torch.randint(70, 90, (2, new), generator=generator).to(device)
                    part = {"input_ids": ids, **zoo.following(name, mask, new, cache.rope_deltas)}
                    mask = part["attention_mask"]


@everywhere
def test_gates_learn(name, device):
    model, inputs, gates = placed(name, device)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    objective, optimiser = Distillation(budget="4"), torch.optim.AdamW(gates.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        step = Step(labels, torch.Generator().manual_seed(0))
        terms, _ = objective.loss(collect(model, gates, objective, inputs, step))
        optimiser.zero_grad()
        terms.loss().backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in gates.parameters())
        losses.append(terms.loss().item())
        optimiser.step()
    assert losses[-1] < losses[0]
