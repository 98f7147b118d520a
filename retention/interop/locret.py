"""Locret's retaining heads: a small network over queries, keys and values before their rotation (arXiv 2410.01805)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from retention.gates import RetentionGates
from retention.gates.architecture import ACTIVATIONS
from retention.gates.trim import Trim
from retention.interop.layout import Layout, by_layer, imported, read_tensors, spared_layers
from retention.interop.settings import one_of
from retention.models.family import decoder_of, model_shape
from retention.types import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT = "Locret, names reconstructed"
"""Its repository carries no licence and was not opened: form and sizes are the paper's, the names of tensors a guess."""


def from_state_dict(
    tensors: Mapping[str, Shaped[Tensor, "..."]], config: Mapping[str, Any], model: "PreTrainedModel"
) -> RetentionGates:
    """`score = fc2 act(fc1 [q, k, v])`, which with `[q, k, v] = W x + b` is a gate on x: `fc2 act((fc1 W) x + fc1 b)`.

    Names (reconstructed): `...layers.<i>.self_attn.fc1.weight` [width, (heads + 2 kv_heads) head_dim] and
    `fc2.weight` [kv_heads, width], no biases. Config: hidden_act, by default silu. The policy is `locret`.

    Raises:
        ValueError: when they do not fit the model, naming the tensor, or its queries and keys are more than linear in x.
    """
    activation, shape = one_of(config, "hidden_act", "silu", ACTIVATIONS), model_shape(model)
    layout = by_layer(Layout(tensors, "these Locret heads"), "self_attn")
    width = layout.size(f"layers.{shape.layers[0]}.fc1.weight", 0)
    ours = {}
    for number, layer in enumerate(shape.layers):
        own, theirs = f"layers.{number}", f"layers.{layer}"
        weight, bias = _projection(decoder_of(model).layers[layer].self_attn, shape)
        first = layout.take(f"{theirs}.fc1.weight", width, len(weight)).double()
        ours[f"{own}.0.weight"], ours[f"{own}.0.bias"] = (first @ weight).float(), (first @ bias).float()
        ours[f"{own}.2.weight"] = layout.take(f"{theirs}.fc2.weight", shape.num_kv_heads, width)
        ours[f"{own}.2.offset"] = torch.zeros(shape.num_kv_heads)
    layout.check_rest(spared_layers(model, shape.layers))
    gate = Trim(gate_hidden=width, activation=activation)
    return imported(gate, model, ours, objective="locret", score_kind="static", layout=LAYOUT)


def _projection(attention: Any, shape: ModelShape) -> tuple[Float[Tensor, "qkv hidden"], Float[Tensor, " qkv"]]:
    """From attention input to queries, keys and values of all heads, one below the other, float64.

    Raises:
        ValueError: when a layer normalises them, or its weights are quantised.
    """
    if hasattr(attention, "q_norm") or hasattr(attention, "k_norm"):
        raise ValueError(
            "expected a base whose queries and keys are linear in the attention's input, got one with norms"
        )
    fused = getattr(attention, "qkv_proj", None)
    parts = [fused] if fused is not None else [attention.q_proj, attention.k_proj, attention.v_proj]
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    weight = torch.cat([part.weight.detach().cpu() for part in parts])
    if not weight.is_floating_point() or weight.shape != (rows, shape.hidden_size):
        raise ValueError("expected projections in whole numbers of heads and not quantised; load the base unquantised")
    biases = [torch.zeros(len(part.weight)) if part.bias is None else part.bias.detach().cpu() for part in parts]
    return weight.double(), torch.cat(biases).double()


def load(file: Path | str, model: "PreTrainedModel", *, hidden_act: str | None = None) -> RetentionGates:
    """Heads of a file; the activation is the model's own unless given."""
    act = hidden_act or getattr(decoder_of(model).config, "hidden_act", "silu")
    return from_state_dict(read_tensors(file), {"hidden_act": act}, model)
