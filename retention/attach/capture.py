"""One full-cache forward, keeping each layer's queries, keys, values and gate outputs: what a memory is trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retention.attach.facts import Facts
from retention.attach.hooks import attached
from retention.attach.plain import logit_scaling, plain_attention
from retention.gates import RetentionGates
from retention.models.family import model_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "retention_capture"


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
    log_beta: list[Tensor] = field(default_factory=list)
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

    def context(self) -> Bool[Tensor, "batch tokens"]:
        """What comes before the questions: everything up to a row's last visual token, or two thirds of a text."""
        valid, visual = self.valid, self.visual
        assert valid is not None
        assert visual is not None
        columns = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(visual & valid, columns, -1).amax(1)
        text = (valid.cumsum(1) * 3 >= valid.sum(1, keepdim=True) * 2).long().argmax(1)
        return valid & (columns <= torch.where(last >= 0, last, text)[:, None])


def capturing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    retention_capture: Capture | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface: the model's own that remembers what it was given."""
    if retention_capture is not None:
        scale = logit_scaling(query, scaling, kwargs.get("softcap"))
        log_beta = retention_capture.log_beta.pop() if retention_capture.log_beta else None
        retention_capture.layers.append(LayerCapture(query, key, value, scale, log_beta))
    return plain_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


@contextmanager
def capture_attention(model: "PreTrainedModel", gates: RetentionGates | None = None) -> Iterator[Capture]:
    """Inside, every forward without a cache fills the yielded capture; on exit the model is exactly as before."""
    found, layers = Capture(), model_shape(model).layers

    @torch.no_grad()
    def before_layer(layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if gates is not None:
            beside = {"visual": found.visual, "valid": found.valid}
            found.log_beta.append(gates(layers.index(layer), kwargs["hidden_states"], **beside))
        return {"retention_capture": found}

    with attached(model, NAME, capturing_attention, layers, before_layer, before_forward=found.begin):
        yield found
