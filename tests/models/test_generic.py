"""Architectures that are not listed: taken where they behave as listed ones do, refused with the reason where not."""

import logging
import warnings

import pytest
import torch
import transformers

from retention import Budget, CacheConfig, RetentionGates, evicting
from retention.attach.soft import attach_gates
from retention.gates.trim import Trim
from retention.models import family_of, rope_of
from tests.attach.helpers import snapshot
from tests.cache.helpers import gap, small, tokens
from tests.cache.truth import Hiding

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
ROTATED = ["Olmo2", "Granite", "Starcoder2", "StableLm", "Gemma"]
OTHERWISE = {"Cohere": {}, "Glm4": {"head_dim": 16}, "SmolLM3": {"no_rope_layers": [1, 0]}}
MLA = {"n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
MLA |= {"qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 2}
REFUSED = {
    "GptOss": (EXPERTS | {"head_dim": 16, "layer_types": ["full_attention"] * 2}, "takes s_aux"),
    "DeepseekV3": (MLA, "keys of shape .* does not tell"),
    "Bloom": ({"n_layer": 2, "n_head": 4}, "has no layers"),
}


def built(name, **changes):
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES | changes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in ROTATED), *OTHERWISE.items()])
def test_a_standard_decoder_works_and_is_noted_once(name, changes, caplog):
    model, ids = built(name, **changes), tokens(2, 24)
    oracle, before = Hiding(model), snapshot(model)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        family = family_of(model)
        assert family_of(model) is family
        assert snapshot(model) == before
        with evicting(model, small("knorm"), CacheConfig(Budget(6.0))) as cache:
            for part in (ids, ids[:, :1], ids[:, 3:8]):
                got = model(part, past_key_values=cache).logits
                assert gap(got, oracle.feed(input_ids=part)) < 1e-4
                oracle.drop(cache)
        gates = RetentionGates.for_model(Trim(gate_hidden=8, init_half_life=1e9), model)
        expected = model(ids, use_cache=False).logits
        with attach_gates(model, gates):
            assert gap(model(ids, use_cache=False).logits, expected) < 1e-4
    notes = [record.getMessage() for record in caplog.records if "no listed family" in record.getMessage()]
    assert len(notes) == 1
    assert ("half-split" in notes[0]) == (name in ROTATED)


@pytest.mark.parametrize(("name", "changes"), OTHERWISE.items())
def test_keys_that_are_rotated_otherwise_cannot_be_packed(name, changes):
    model = built(name, **changes)
    with (
        pytest.raises(ValueError, match="not known; use positions=original"),
        evicting(model, small("knorm"), CacheConfig(Budget(6.0), positions="packed")),
    ):
        pass


@pytest.mark.parametrize("name", ROTATED)
def test_half_split_keys_can(name):
    model = built(name)
    assert rope_of(model, family_of(model)).axes == 1


@pytest.mark.parametrize(("name", "changes", "reason"), [(n, *given) for n, given in REFUSED.items()])
def test_others_are_refused_with_the_reason(name, changes, reason):
    model = built(name, **changes)
    with pytest.raises(ValueError, match=rf"supported family \(gemma2, .*model_type '.*': .*{reason}"):
        family_of(model)
