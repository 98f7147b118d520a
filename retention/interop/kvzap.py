"""KVzap's gates: a linear map or a small network per layer (arXiv 2601.07891)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Shaped
from torch import Tensor

from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.interop.layout import Layout, imported, read_tensors, spared_layers
from retention.interop.settings import count, read_config
from retention.models.family import decoder_of, model_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT = "KVzap, as read by kvpress 0.5.5 (Apache-2.0)"
PUBLISHED = "cache.selector=threshold cache.threshold=-4"


def from_state_dict(
    tensors: Mapping[str, Shaped[Tensor, "..."]], config: Mapping[str, Any], model: "PreTrainedModel"
) -> RetentionGates:
    """`score = W x + b`, or `W2 gelu(W1 x + b1) + b2` where `config["hidden_dim"]` is a number.

    Names: `layers.<i>.weight` and `.bias`, or `layers.<i>.0.*` and `layers.<i>.2.*`; config: input_dim, output_dim,
    n_modules, hidden_dim. The policy is `kvzap`; the paper evicts what scores below -4.

    Raises:
        ValueError: when they do not fit the model, naming tensor or setting.
    """
    shape, width = model_shape(model), count(config, "hidden_dim")
    fits = {
        "input_dim": shape.hidden_size,
        "output_dim": shape.num_kv_heads,
        "n_modules": decoder_of(model).config.num_hidden_layers,
    }
    for name, wanted in fits.items():
        if config.get(name) != wanted:
            raise ValueError(f"expected KVzap gates with {name} {wanted} for this model, got {config.get(name)}")
    layout, heads, hidden = Layout(tensors, "these KVzap gates"), shape.num_kv_heads, shape.hidden_size
    ours = {}
    for number, layer in enumerate(shape.layers):
        theirs, own = f"layers.{layer}", f"layers.{number}"
        if width is None:
            ours[f"{own}.0.weight"] = layout.take(f"{theirs}.weight", heads, hidden)
            ours[f"{own}.0.offset"] = layout.take(f"{theirs}.bias", heads)
        else:
            ours[f"{own}.0.weight"] = layout.take(f"{theirs}.0.weight", width, hidden)
            ours[f"{own}.0.bias"] = layout.take(f"{theirs}.0.bias", width)
            ours[f"{own}.2.weight"] = layout.take(f"{theirs}.2.weight", heads, width)
            ours[f"{own}.2.offset"] = layout.take(f"{theirs}.2.bias", heads)
    layout.check_rest(spared_layers(model, shape.layers))
    gate = Trim(gate_hidden=width or 0, activation="gelu")
    return imported(gate, model, ours, objective="kvzap", score_kind="static", layout=LAYOUT, published=PUBLISHED)


def load(folder: Path | str, model: "PreTrainedModel") -> RetentionGates:
    """Gates of a folder with `config.json` and safetensors, as NVIDIA publishes them."""
    return from_state_dict(read_tensors(folder), read_config(folder), model)
