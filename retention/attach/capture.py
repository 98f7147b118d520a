"""One full-cache forward, keeping each layer's queries, keys, values and gate outputs: what a memory is trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.attach.facts import Facts
from retention.attach.hooks import Attend, attached
from retention.attach.plain import AttentionCall
from retention.gates import RetentionGates
from retention.models.family import model_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class LayerCapture:
    """What attention of one layer saw, post-RoPE."""

    query: Float[Tensor, "batch heads tokens head_dim"]
    key: Float[Tensor, "batch kv_heads tokens head_dim"]
    value: Float[Tensor, "batch kv_heads tokens value_dim"]
    scaling: float
    log_beta: Float[Tensor, "batch kv_heads tokens"] | None = None


@dataclass
class Capture:
    """The newest forward, all evictable layers in order, and where its tokens are."""

    layers: list[LayerCapture] = field(default_factory=list)
    valid: Bool[Tensor, "batch tokens"] | None = None
    visual: Bool[Tensor, "batch tokens"] | None = None
    positions: Int[Tensor, "batch tokens"] | None = None
    places: Int[Tensor, "batch tokens 4"] | None = None
    """Image, frame, row and column of patches, if known."""

    def begin(self, facts: Facts) -> None:
        """Forget the forward before; these are the next one's tokens."""
        self.layers.clear()
        self.valid, self.positions, self.visual = facts.valid, facts.positions, facts.visual
        self.places = facts.places()

    def attend(
        self, log_beta: Float[Tensor, "batch kv_heads tokens"] | None, call: AttentionCall
    ) -> Float[Tensor, "batch tokens heads value_dim"]:
        """The model's own attention, and what it was given is remembered."""
        self.layers.append(LayerCapture(call.query, call.key, call.value, call.scaling, log_beta))
        return call.plain()

    def context(self) -> Bool[Tensor, "batch tokens"]:
        """What comes before the questions: everything up to a row's last visual token, or two thirds of a text."""
        valid, visual = self.valid, self.visual
        assert valid is not None
        assert visual is not None
        columns = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(visual & valid, columns, -1).amax(1)
        text = (valid.cumsum(1) * 3 >= valid.sum(1, keepdim=True) * 2).long().argmax(1)
        return valid & (columns <= torch.where(last >= 0, last, text)[:, None])


@contextmanager
def capture_attention(model: "PreTrainedModel", gates: RetentionGates | None = None) -> Iterator[Capture]:
    """Inside, every forward without a cache fills the yielded capture; on exit the model is exactly as before."""
    found, layers = Capture(), model_shape(model).layers

    @torch.no_grad()
    def before_layer(layer: int, kwargs: dict[str, Any]) -> Attend:
        if gates is None:
            return partial(found.attend, None)
        beside = {"visual": found.visual, "valid": found.valid}
        return partial(found.attend, gates(layers.index(layer), kwargs["hidden_states"], **beside))

    with attached(model, layers, before_layer, before_forward=found.begin):
        yield found
