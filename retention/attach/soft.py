"""Training glue: gates on a frozen model's attention, as additive decay, with gradients to the gates only."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retention.attach.facts import TokenFacts, attached, register_attention, token_positions, valid_tokens
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.family import decoder_of
from retention.ops.attention import augmented_gated_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "retention_soft"


@dataclass
class GateRecord:
    """What the last gated forward produced: one `log_beta` per layer, and where its tokens are."""

    log_beta: dict[int, Float[Tensor, "batch kv_heads tokens"]] = field(default_factory=dict)
    positions: Int[Tensor, "batch tokens"] | None = None
    valid: Bool[Tensor, "batch tokens"] | None = None
    visual: Bool[Tensor, "batch tokens"] | None = None
    padded: bool = False

    def stacked(self) -> list[Float[Tensor, "batch kv_heads tokens"]]:
        """`log_beta` of all layers, in order."""
        return [self.log_beta[layer] for layer in sorted(self.log_beta)]


def gated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    retention_gate: tuple[Tensor, GateRecord] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface; layers without a gate run plain SDPA."""
    if retention_gate is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    log_beta, record = retention_gate
    assert record.positions is not None
    if query.shape[2] != key.shape[2]:
        raise ValueError("gated training attention runs without a cache; pass use_cache=False")
    out = augmented_gated_attention(
        query,
        key,
        value,
        log_beta,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        positions=record.positions,
        valid=record.valid if record.padded else None,
    )
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def attach_gates(model: "PreTrainedModel", gates: RetentionGates) -> Iterator[GateRecord]:
    """Run forwards of `model` with retention-gated attention; on exit the model is exactly as before.

    Gradients reach the gates only. Use without a cache (`use_cache=False`), one document per row.

    Raises:
        ValueError: when the gates do not fit the model, or it is attached already.
    """
    gates.check(model)
    decoder, record = decoder_of(model), GateRecord()
    facts = TokenFacts(family_of(model), model.config)

    def before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, tokens = inputs.shape[:2]
        mask = kwargs.get("attention_mask")
        record.log_beta.clear()
        record.valid = valid_tokens(mask, batch, tokens, inputs.device)
        record.padded = mask is not None and not bool(record.valid.all())
        record.positions = token_positions(record.valid)
        record.visual = facts.take(batch, tokens, inputs.device)

    def before_attention(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        number = gates.shape.layers.index(module.layer_idx)
        log_beta = gates(number, kwargs["hidden_states"])
        record.log_beta[number] = log_beta
        return args, {**kwargs, "retention_gate": (log_beta, record)}

    register_attention(NAME, gated_attention)
    with ExitStack() as stack:
        stack.enter_context(attached(model, NAME))
        hooks = [model.register_forward_pre_hook(facts.catch, with_kwargs=True)]
        hooks.append(decoder.register_forward_pre_hook(before_decoder, with_kwargs=True))
        for layer in gates.shape.layers:
            attention = decoder.layers[layer].self_attn
            hooks.append(attention.register_forward_pre_hook(before_attention, with_kwargs=True))
        for hook in hooks:
            stack.callback(hook.remove)
        yield record
