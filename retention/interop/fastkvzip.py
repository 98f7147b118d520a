"""Fast KVzip's gates: low-rank queries against learned keys (arXiv 2601.17668)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Shaped
from torch import Tensor

from retention.gates import RetentionGates
from retention.gates.fastkvzip import FastKVzip
from retention.interop.layout import Layout, imported, read_tensors
from retention.interop.settings import real
from retention.models.family import decoder_of, model_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT = "Fast KVzip, as read by kvpress 0.5.5 (Apache-2.0)"
PUBLISHED = "cache.sink_size=4"
EPS = 1e-6
"""Of the norms, which are Qwen3's."""


def from_state_dict(
    tensors: Sequence[Mapping[str, Shaped[Tensor, "..."]]], config: Mapping[str, Any], model: "PreTrainedModel"
) -> RetentionGates:
    """`p = mean over the group of 1 / (1 + sum_m exp(q.k_base_m / sqrt(r) - q.k / sqrt(r) - b))`; our score is its logit.

    One mapping for each decoder layer: q_proj.weight and .bias, k_proj.weight, q_norm.weight, k_norm.weight, `k_base`
    [kv_heads, 1, bases, r] and `b` [kv_heads, 1, group]. Our offset takes in the log of the number of bases. The
    config may give norm_eps; the files have none. The policy is `fastkvzip`.

    Raises:
        ValueError: when they do not fit the model, naming the tensor.
    """
    shape, whole = model_shape(model), decoder_of(model).config.num_hidden_layers
    if len(tensors) != whole:
        raise ValueError(f"expected Fast KVzip gates of {whole} layers for this model, got {len(tensors)}")
    heads, hidden, group = shape.num_kv_heads, shape.hidden_size, shape.num_heads // shape.num_kv_heads
    ours, rank, bases = {}, 0, 0
    for number, layer in enumerate(shape.layers):
        layout, own = Layout(tensors[layer], f"layer {layer} of these Fast KVzip gates"), f"layers.{number}"
        if not number:
            rank, bases = layout.size("k_base", 3), layout.size("k_base", 2)
            if not bases:
                raise ValueError("expected Fast KVzip gates with learned keys in k_base, got none of them")
        ours[f"{own}.query.weight"] = layout.take("q_proj.weight", shape.num_heads * rank, hidden)
        ours[f"{own}.query.bias"] = layout.take("q_proj.bias", shape.num_heads * rank)
        ours[f"{own}.key.weight"] = layout.take("k_proj.weight", heads * rank, hidden)
        ours[f"{own}.query_norm.weight"] = layout.take("q_norm.weight", rank)
        ours[f"{own}.key_norm.weight"] = layout.take("k_norm.weight", rank)
        ours[f"{own}.base_keys"] = layout.take("k_base", heads, 1, bases, rank).squeeze(1)
        ours[f"{own}.offset"] = layout.take("b", heads, 1, group).flatten() - math.log(bases)
        layout.check_rest()
    eps = real(config, "norm_eps", EPS)
    if eps <= 0:
        raise ValueError(f"expected norm_eps above 0 of Fast KVzip gates, got {eps:g}")
    gate = FastKVzip(gate_hidden=rank, bases=bases, norm_eps=eps)
    return imported(gate, model, ours, objective="fastkvzip", score_kind="static", layout=LAYOUT, published=PUBLISHED)


def load(file: Path | str, model: "PreTrainedModel") -> RetentionGates:
    """Gates of a published file `q<group>_dim16_sink16.pt`, whose entry `module` lists the layers.

    Raises:
        ValueError: when it has no such list, or they do not fit the model.
    """
    listed: Any = read_tensors(file).get("module")
    if not isinstance(listed, list) or not all(isinstance(x, Mapping) for x in listed):
        raise ValueError(f"expected a list of layers under 'module' in {file}, got {type(listed).__name__}")
    return from_state_dict(listed, {}, model)
