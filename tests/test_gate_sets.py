"""Gates beside gates, and gates beside memories: what goes together, and what is refused."""

import pytest
import torch

from retention.gates import GateSets, RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.gates.trim import Trim
from retention.memory import RetentionMemory
from retention.memory.linear import Linear
from retention.memory.slots import Slots
from tests.tiny import tiny_qwen3


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3()


def make(model, config=None, seed=0, **training):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = RetentionGates.for_model(config or Trim(gate_hidden=4), model).requires_grad_(False)
    gates.training_record = training
    return gates


def remembering(gates, config=None, seed=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates.memory = RetentionMemory(config or Linear(features=4, hidden=4), gates.shape).requires_grad_(False)
    return gates


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], x) for name, x in other.items())


def test_sets_are_found_by_name_and_survive_a_folder(model, tmp_path):
    sets = GateSets({"maths": make(model, seed=1), "chat": remembering(make(model, DBTrim(), seed=2))})
    sets.save_pretrained(tmp_path / "sets")
    again = GateSets.from_pretrained(tmp_path / "sets")
    assert (len(again), sorted(again), "maths" in again, "art" in again) == (2, ["chat", "maths"], True, False)
    assert all(same(again[name].tensors(), sets[name].tensors()) for name in sets)
    again.check(model)
    assert RetentionGates.from_pretrained(tmp_path / "sets" / "maths").config == Trim(gate_hidden=4)


def test_an_unknown_set_is_refused_naming_those_there_are(model):
    with pytest.raises(ValueError, match="expected a gate set among maths, chat, got 'art'"):
        GateSets({"maths": make(model), "chat": make(model)})["art"]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", ".hidden", "a b", "a\n", "x" * 65, "a.b"])
def test_names_that_are_no_folders_are_refused(model, name):
    with pytest.raises(ValueError, match="expected gate sets named by letters"):
        GateSets({name: make(model)})


def test_names_that_some_file_systems_take_for_one_are_refused(model):
    with pytest.raises(ValueError, match="names differ in more than case, got chat, Chat"):
        GateSets({"chat": make(model), "Chat": make(model)})


def test_no_sets_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="at least one gate set"):
        GateSets({})
    make(model).save_pretrained(tmp_path / "gates")
    with pytest.raises(ValueError, match="got 0; one set alone is read by RetentionGates"):
        GateSets.from_pretrained(tmp_path / "gates")


def test_what_a_save_left_that_was_cut_off_is_no_set(model, tmp_path):
    GateSets({"a": make(model)}).save_pretrained(tmp_path)
    make(model).save_pretrained(tmp_path / ".b.x1y2")
    assert list(GateSets.from_pretrained(tmp_path)) == ["a"]


def test_a_damaged_set_is_refused(model, tmp_path):
    GateSets({"a": make(model), "b": make(model)}).save_pretrained(tmp_path)
    (tmp_path / "b" / "gate_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the gate artefact in .*b is damaged"):
        GateSets.from_pretrained(tmp_path)


OTHERS = {
    "evictable layers 3": lambda: tiny_qwen3(num_hidden_layers=5),
    "KV heads per layer 2": lambda: tiny_qwen3(num_key_value_heads=4),
    "features per head 16": lambda: tiny_qwen3(head_dim=32),
    "query heads per layer 4": lambda: tiny_qwen3(num_attention_heads=8),
    "weight_hash": lambda: tiny_qwen3(seed=3),
    "config_hash": lambda: tiny_qwen3(rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("word", OTHERS)
def test_sets_and_memories_of_another_base_are_refused(model, word):
    one, other = make(model), remembering(make(OTHERS[word]()))
    with pytest.raises(ValueError, match=f"gates were trained .*{word}.*the base of the others"):
        GateSets({"one": one, "other": other})
    with pytest.raises(ValueError, match=f"gates were trained .*{word}.*the base of the others"):
        one.with_memory(other)


@pytest.mark.parametrize("word", ["features per head 16", "query heads per layer 4"])
def test_a_model_of_other_heads_is_refused(model, word):
    with pytest.raises(ValueError, match=f"{word}, the model has"):
        make(model).check(OTHERS[word]())


def test_a_memory_trained_apart_joins_its_gates(model, tmp_path):
    gates, trained = make(model, objective="distillation", steps=4), remembering(make(model, memory={"steps": 9}))
    merged = gates.with_memory(trained)
    assert gates.memory is None
    assert "memory" not in gates.training_record
    merged.save_pretrained(tmp_path / "merged")
    again = RetentionGates.from_pretrained(tmp_path / "merged")
    assert same(again.stack.state_dict(), gates.stack.state_dict())
    assert same(again.memory.state_dict(), trained.memory.state_dict())
    assert again.training_record == {"objective": "distillation", "steps": 4, "memory": {"steps": 9}}
    merged.memory.layers[0].log_scale.fill_(7.0)
    assert not (trained.memory.layers[0].log_scale == 7.0).any()


def test_a_memory_beside_gates_that_evict_otherwise_says_so(model):
    merged = make(model, seed=1).with_memory(remembering(make(model, seed=2), Slots(slots=4)))
    assert merged.training_record["memory"] == {"trained_beside_these_gates": False}
    assert merged.memory.config == Slots(slots=4)


def test_gates_without_a_memory_have_none_to_give(model):
    with pytest.raises(ValueError, match="expected gates with a memory, got some without"):
        make(model).with_memory(make(model))
