"""Half precision and 8 bits: sizes, errors, what stays whole, and what cannot be stored."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from retention.checkpoint import STORAGES
from retention.checkpoint.storage import layout, packed, unpacked
from retention.gates import GATES, RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.memory import RetentionMemory
from retention.memory.linear import Linear
from retention.types import ModelShape

SHAPE = ModelShape("qwen3", (0, 1), num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)


def make(name="dbtrim", shape=SHAPE, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gates = RetentionGates(GATES[name](**settings), shape).requires_grad_(False)
        for parameter in gates.parameters():
            parameter.normal_(std=0.3)
        return gates


def saved(gates, folder, storage):
    gates.save_pretrained(folder, storage=storage)
    return RetentionGates.from_pretrained(folder)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("storage", STORAGES)
def test_gates_of_every_architecture_come_back_close_and_in_float32(name, storage, tmp_path):
    gates = make(name)
    again = saved(gates, tmp_path / "gates", storage)
    for key, x in gates.tensors().items():
        found = again.tensors()[key]
        assert found.dtype == torch.float32
        allowed = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127}[storage]
        assert float((found - x).abs().max()) <= allowed * float(x.abs().max()) + 1e-7
    assert json.loads((tmp_path / "gates" / "gate_config.json").read_text())["storage"] == storage


def test_storage_shrinks_the_file(tmp_path):
    gates, sizes = make(shape=ModelShape("qwen3", (0, 1), 4, 2, 16, 256)), {}
    for storage in STORAGES:
        saved(gates, tmp_path / storage, storage)
        sizes[storage] = (tmp_path / storage / "gate_model.safetensors").stat().st_size
    assert sizes["float16"] == pytest.approx(sizes["float32"] / 2, rel=0.01)
    assert sizes["bfloat16"] == pytest.approx(sizes["float32"] / 2, rel=0.01)
    assert sizes["int8"] < 0.3 * sizes["float32"]


def test_offsets_biases_last_projections_and_short_rows_stay_whole_in_8_bits(tmp_path):
    gates = make()
    gates.memory = RetentionMemory(Linear(features=4, hidden=4), SHAPE).requires_grad_(False)
    saved(gates, tmp_path / "gates", "int8")
    stored = load_file(tmp_path / "gates" / "gate_model.safetensors")
    rounded = {name for name, x in stored.items() if x.dtype == torch.int8}
    assert rounded == {f"layers.{i}.0.weight" for i in range(2)}  # second layers have rows of 28
    assert {name for name in stored if name.endswith(".scale")} == {f"{name}.scale" for name in rounded}
    again = RetentionGates.from_pretrained(tmp_path / "gates").tensors()
    assert all(torch.equal(again[name], x) for name, x in gates.tensors().items() if name not in rounded)


def test_each_row_has_its_own_scale():
    x = torch.tensor([[1.0] * 31 + [127.0], [0.001] * 31 + [0.127]])
    found = packed({"w": x}, "int8")
    torch.testing.assert_close(found["w.scale"], torch.tensor([1.0, 0.001]))
    assert found["w"].tolist() == [[1] * 31 + [127]] * 2
    torch.testing.assert_close(unpacked(found)["w"], x)


def test_rows_of_zeros_stay_zero():
    assert torch.equal(unpacked(packed({"w": torch.zeros(2, 40)}, "int8"))["w"], torch.zeros(2, 40))


def test_what_float16_cannot_hold_is_refused_and_bfloat16_can():
    large = {"w": torch.full((2, 2), 1e6)}
    with pytest.raises(ValueError, match=r"w holds values too large for float16; save with storage=bfloat16"):
        packed(large, "float16")
    assert packed(large, "bfloat16")["w"].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gates_that_are_not_finite_are_never_saved(value, tmp_path):
    gates = make()
    nn.init.constant_(gates.stack.layers[0][0].bias, value)
    with pytest.raises(ValueError, match="expected finite gates"):
        gates.save_pretrained(tmp_path / "gates")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_storage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected storage float32, float16, bfloat16 or int8, got 'int4'"):
        make().save_pretrained(tmp_path / "gates", storage="int4")


def test_8_bits_without_scales_are_no_tensors():
    with pytest.raises(ValueError, match="no scale for each row"):
        layout({"w": ((2, 40), True)})
    with pytest.raises(ValueError, match="no scale for each row"):
        layout({"w": ((2, 40), True), "w.scale": ((1,), False)})
    assert layout({"w.scale": ((2,), False)}) == {"w.scale": (2,)}


def test_gates_in_half_precision_are_saved_without_loss(tmp_path):
    gates = make().to(torch.bfloat16)
    again = saved(gates, tmp_path / "gates", "bfloat16")
    assert again.config == DBTrim()
    assert all(torch.equal(again.tensors()[name], x.float()) for name, x in gates.tensors().items())
