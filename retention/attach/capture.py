"""One full-cache forward, keeping each layer's queries, keys, values and gate outputs: what a memory is trained on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retention.attach.facts import TokenFacts, attached, register_attention, token_positions, valid_tokens
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.family import decoder_of, model_shape

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
    """Attention function for transformers' interface: plain SDPA that remembers what it was given."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if retention_capture is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        log_beta = retention_capture.log_beta.pop() if retention_capture.log_beta else None
        retention_capture.layers.append(LayerCapture(query, key, value, scale, log_beta))
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


@contextmanager
def capture_attention(model: "PreTrainedModel", gates: RetentionGates | None = None) -> Iterator[Capture]:
    """Inside, every forward without a cache fills the yielded capture; on exit the model is exactly as before."""
    decoder, found = decoder_of(model), Capture()
    facts, layers = TokenFacts(family_of(model), model.config), model_shape(model).layers

    def before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, tokens = inputs.shape[:2]
        found.layers.clear()
        found.valid = valid_tokens(kwargs.get("attention_mask"), batch, tokens, inputs.device)
        found.positions = token_positions(found.valid)
        found.visual = facts.take(batch, tokens, inputs.device)
        found.places = facts.places(batch, tokens, inputs.device)

    @torch.no_grad()
    def before_attention(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if gates is not None:
            beside = {"visual": found.visual, "valid": found.valid}
            found.log_beta.append(gates(layers.index(module.layer_idx), kwargs["hidden_states"], **beside))
        return args, {**kwargs, "retention_capture": found}

    register_attention(NAME, capturing_attention)
    with ExitStack() as stack:
        stack.enter_context(attached(model, NAME))
        hooks = [model.register_forward_pre_hook(facts.catch, with_kwargs=True)]
        hooks.append(decoder.register_forward_pre_hook(before_decoder, with_kwargs=True))
        for layer in layers:
            attention = decoder.layers[layer].self_attn
            hooks.append(attention.register_forward_pre_hook(before_attention, with_kwargs=True))
        for hook in hooks:
            stack.callback(hook.remove)
        yield found
