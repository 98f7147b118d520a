"""TRIM-KV's and DBTrimKV's gates (arXiv 2512.03324 and 2605.09649)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Shaped
from torch import Tensor

from retention.gates import GateConfig, RetentionGates
from retention.gates.architecture import ACTIVATIONS
from retention.gates.dbtrim import DBTrim
from retention.gates.trim import Trim
from retention.interop.layout import Layout, by_layer, imported, read_tensors, spared_layers
from retention.interop.settings import count, flag, one_of, read_config
from retention.models.family import model_shape
from retention.types import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT = "trimkv 0.1.5 (Apache-2.0)"
FILE = "trimkv_weights.pth"
PUBLISHED = {"rg": "policy.trim_kv.age_offset=1", "rg10": "policy.db_trim_kv.age_offset=1"}
KINDS = ("rg", "rg10")
"""A gate per layer (TRIM-KV); features per layer and one projection, whose copies are listed at every layer (DBTrimKV)."""


def from_state_dict(
    tensors: Mapping[str, Shaped[Tensor, "..."]], config: Mapping[str, Any], model: "PreTrainedModel"
) -> RetentionGates:
    """`log_beta = logsigmoid(linear2(act(linear1(x))) + bias)`, or with a third linear layer that all layers share.

    Names: `...layers.<i>.self_attn.retention_gate.` and linear1.weight, linear1.bias, linear2.weight, bias; of `rg10`
    also linear2.bias and linear3.weight. Config: retention_gate, hidden_act, tie_retention_gate_layers, memory_size, of a
    vision-language model partly in its text_config. The policies are `trim_kv` and `db_trim_kv`; the public code
    ranks with `age_offset: 1`.

    Raises:
        ValueError: when they do not fit the model, naming tensor or setting.
    """
    inner = config.get("text_config") or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"expected text_config of TRIM-KV gates to be a JSON object, got {type(inner).__name__}")
    told = {**config, **inner}
    kind, activation = one_of(told, "retention_gate", None, KINDS), one_of(told, "hidden_act", "silu", ACTIVATIONS)
    layout, shape = by_layer(Layout(tensors, "these TRIM-KV gates"), "self_attn.retention_gate"), model_shape(model)
    width = layout.size(f"layers.{shape.layers[0]}.linear1.weight", 0)
    gate: GateConfig = Trim(gate_hidden=width, activation=activation)
    ours = {}
    for number, layer in enumerate(shape.layers):
        own, theirs = f"layers.{number}", f"layers.{layer}"
        ours[f"{own}.0.weight"] = layout.take(f"{theirs}.linear1.weight", width, shape.hidden_size)
        ours[f"{own}.0.bias"] = layout.take(f"{theirs}.linear1.bias", width)
        last = "linear2"
        if kind == "rg10":
            ours[f"{own}.2.weight"] = layout.take(f"{theirs}.linear2.weight", width, width)
            ours[f"{own}.2.bias"] = layout.take(f"{theirs}.linear2.bias", width)
            last = "linear3"
        head = f"{own}.{4 if kind == 'rg10' else 2}"
        ours[f"{head}.weight"] = layout.take(f"{theirs}.{last}.weight", shape.num_kv_heads, width)
        ours[f"{head}.offset"] = layout.take(f"{theirs}.bias", shape.num_kv_heads)
    layout.check_rest(spared_layers(model, shape.layers))
    if kind == "rg10":
        tied = flag(told, "tie_retention_gate_layers", True)
        gate = DBTrim(gate_hidden=width, activation=activation, tied=tied)
        ours = _tied(ours, shape) if tied else ours
    record: dict[str, Any] = {"layout": LAYOUT, "published": PUBLISHED[kind], "budget": count(told, "memory_size")}
    return imported(gate, model, ours, objective="distillation", score_kind="decay", **record)


def _tied(ours: dict[str, Float[Tensor, "..."]], shape: ModelShape) -> dict[str, Float[Tensor, "..."]]:
    """The same with the last projection stored once.

    Raises:
        ValueError: when its copies differ.
    """
    for number, layer in enumerate(shape.layers):
        for part, name in (("weight", "linear3.weight"), ("offset", "bias")):
            copy = ours.pop(f"layers.{number}.4.{part}")
            first = ours.setdefault(f"shared.{part}", copy)
            if not copy.equal(first):
                raise ValueError(
                    f"retention_gate.{name} of layer {layer} differs from the first layer's, and the config says they are one; "
                    "with tie_retention_gate_layers false in the config each layer keeps its own"
                )
    return ours


def load(folder: Path | str, model: "PreTrainedModel") -> RetentionGates:
    """Gates of a folder with `config.json` and `trimkv_weights.pth`, or safetensors under the same names."""
    folder = Path(folder)
    file = folder / FILE if (folder / FILE).is_file() else folder
    return from_state_dict(read_tensors(file), read_config(folder), model)
