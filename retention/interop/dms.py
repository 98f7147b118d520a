"""DMS's decisions: a linear map of the normalised residual stream, read one token later (arXiv 2506.05345)."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.interop.layout import Layout, by_layer, imported, read_tensors, spared_layers
from retention.interop.settings import count, flag, one_of, read_config, real
from retention.models.family import decoder_of, model_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT = "NVIDIA Model-Optimizer, experimental/dms at 1752723 (Apache-2.0)"
PUBLISHED = "cache.selector=threshold cache.threshold=0"
NAMES = "dms_proj_alpha"


def from_state_dict(
    tensors: Mapping[str, Shaped[Tensor, "..."]], config: Mapping[str, Any], model: "PreTrainedModel"
) -> RetentionGates:
    """`e_i = scale (W RMSNorm(r_{i+1}) + b) - offset`; a token leaves where `e > 0`, so our score is `-e`.

    Names: `...layers.<i>.self_attn.dms_proj_alpha.weight` [kv_heads, hidden], its bias where there is one, and
    `dms_proj_alpha_norm.weight`. Config: dms_separate_alpha, dms_alpha_scale, dms_initial_alpha_offset, dms_alpha_per,
    dms_window_size. r is the residual stream before the layer's own norm, which gates do not see; they see
    `x = w RMSNorm(r)` with the same epsilon, so that dividing by w is exact. The policy is `dms`, in the
    paper with `cache.selector=threshold cache.threshold=0`.

    Raises:
        ValueError: when they do not fit the model, naming tensor or setting.
    """
    if not flag(config, "dms_separate_alpha", False):
        raise ValueError(
            "expected DMS gates with parameters of their own (dms_separate_alpha true), got some inside the queries: "
            "those change the base, which stays frozen here"
        )
    scale, offset = real(config, "dms_alpha_scale", 100.0), real(config, "dms_initial_alpha_offset", 5.0)
    per, shape = one_of(config, "dms_alpha_per", "head", ("head", "layer")), model_shape(model)
    own = {k: v for k, v in tensors.items() if NAMES in k}
    layout = by_layer(Layout(own, "these DMS gates"), "self_attn")
    heads, hidden, ours = shape.num_kv_heads, shape.hidden_size, {}
    for number, layer in enumerate(shape.layers):
        theirs = f"layers.{layer}.{NAMES}"
        norm = layout.take(f"{theirs}_norm.weight", hidden).double() / _own_norm(decoder_of(model).layers[layer], layer)
        weight = layout.take(f"{theirs}.weight", heads, hidden).double() * norm
        there = f"{theirs}.bias" in layout.tensors
        bias = layout.take(f"{theirs}.bias", heads).double() if there else torch.zeros(heads).double()
        if per == "layer":
            weight, bias = weight[:1].expand(heads, -1), bias[:1].expand(heads)
        ours[f"layers.{number}.0.weight"] = (-scale * weight).float()
        ours[f"layers.{number}.0.offset"] = (offset - scale * bias).float()
    layout.check_rest(spared_layers(model, shape.layers))
    gate, window = Trim(gate_hidden=0, delayed=True), count(config, "dms_window_size")
    record: dict[str, Any] = {"layout": LAYOUT, "published": PUBLISHED, "window": window}
    return imported(gate, model, ours, objective="dms", score_kind="static", **record)


@torch.no_grad()
def _own_norm(layer: Any, number: int) -> Float[Tensor, " hidden"]:
    """Weight of the norm before a layer's attention as it acts, float64, whatever form it is stored in.

    Raises:
        ValueError: when the norm is not of that kind, or has a zero.
    """
    norm = copy.deepcopy(layer.input_layernorm).to("cpu", torch.float32)
    ones = torch.full((1, 1, norm.weight.numel()), 1e4)
    weight = norm(ones).flatten().double()
    if not torch.equal(weight, -norm(-ones).flatten().double()) or not weight.all():
        raise ValueError(f"expected an RMS norm without zeros before the attention of layer {number}, got another one")
    return weight


def load(folder: Path | str, model: "PreTrainedModel") -> RetentionGates:
    """Gates of a folder with a whole DMS model, of which only they are read; `model` is its base, loaded as usual."""
    return from_state_dict(read_tensors(folder, lambda key: NAMES in key), read_config(folder), model)
