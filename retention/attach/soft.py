"""Training glue: gates act on a frozen model's attention, by decay or another way, and alone receive gradients."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retention.attach.facts import TokenFacts, attached, register_attention, token_positions, valid_tokens
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.family import decoder_of
from retention.objectives.base import Attended, GatedCall, decayed
from retention.ops.decay import log_beta_from_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "retention_soft"


@dataclass
class GateRecord:
    """What the last gated forward produced: one score and one `log_beta` per layer, and where its tokens are."""

    attend: Callable[[GatedCall], Attended] = decayed
    score: dict[int, Float[Tensor, "batch kv_heads tokens"]] = field(default_factory=dict)
    log_beta: dict[int, Float[Tensor, "batch kv_heads tokens"]] = field(default_factory=dict)
    positions: Int[Tensor, "batch tokens"] | None = None
    valid: Bool[Tensor, "batch tokens"] | None = None
    visual: Bool[Tensor, "batch tokens"] | None = None
    padded: bool = False
    noted: dict[int, Tensor] = field(default_factory=dict)
    """What `attend` noted, by layer."""

    def clear(self) -> None:
        """Forget the forward before."""
        for kept in (self.score, self.log_beta, self.noted):
            kept.clear()

    def stacked(self, what: str = "log_beta") -> list[Tensor]:
        """`log_beta`, `score` or `noted` of all layers, in order."""
        kept = getattr(self, what)
        return [kept[layer] for layer in sorted(kept)]


def gated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    retention_gate: tuple[int, Tensor, GateRecord] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface; layers without a gate run plain SDPA."""
    out = None if retention_gate is None else _attended(module, query, key, value, scaling, *retention_gate)
    if out is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return out.transpose(1, 2).contiguous(), None


def _attended(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    number: int,
    hidden: Tensor,
    record: GateRecord,
) -> Tensor | None:
    """A gated layer's output by the record's `attend`; None leaves the model's own."""
    if query.shape[2] != key.shape[2]:
        raise ValueError("gated training attention runs without a cache; pass use_cache=False")
    assert record.positions is not None
    assert record.valid is not None
    call = GatedCall(
        query,
        key,
        value,
        hidden,
        getattr(getattr(module, "o_proj", None), "weight", None),
        record.score[number],
        record.log_beta[number],
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        record.positions,
        record.valid,
        record.padded,
    )
    out, noted = record.attend(call)
    if noted is not None:
        record.noted[number] = noted
    return out


@contextmanager
def attach_gates(
    model: "PreTrainedModel",
    gates: RetentionGates,
    attend: Callable[[GatedCall], Attended] = decayed,
    *,
    budget: Float[Tensor, " batch"] | None = None,
) -> Iterator[GateRecord]:
    """Run forwards of `model` with gated attention, by decay unless told otherwise; on exit the model is as before.

    Gradients reach the gates only. Use without a cache (`use_cache=False`), one document per row. Conditioned gates
    read `budget`, entries per head of each row.

    Raises:
        ValueError: when the gates do not fit the model, or it is attached already.
    """
    gates.check(model)
    decoder, record = decoder_of(model), GateRecord(attend)
    facts = TokenFacts(family_of(model), model.config)

    def before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, tokens = inputs.shape[:2]
        mask = kwargs.get("attention_mask")
        record.clear()
        record.valid = valid_tokens(mask, batch, tokens, inputs.device)
        record.padded = mask is not None and not bool(record.valid.all())
        record.positions = token_positions(record.valid)
        record.visual = facts.take(batch, tokens, inputs.device)

    def before_attention(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        number = gates.shape.layers.index(module.layer_idx)
        beside = {"visual": record.visual, "valid": record.valid, "budget": budget}
        score = gates.score(number, kwargs["hidden_states"], **beside)
        record.score[number], record.log_beta[number] = score, log_beta_from_score(score)
        return args, {**kwargs, "retention_gate": (number, kwargs["hidden_states"], record)}

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
