"""Training glue: gates act on a frozen model's attention, by decay or another way, and alone receive gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.attach.facts import Facts
from retention.attach.hooks import Attend, attached
from retention.attach.packed import in_each
from retention.attach.plain import AttentionCall, output_weight
from retention.gates import RetentionGates
from retention.models import family_of
from retention.objectives.base import Attended, GatedCall, decayed
from retention.ops.decay import log_beta_from_score
from retention.ops.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    own_mask: bool = False
    """Whether attention is more than causal, so that the mask the model made has to be read."""
    noted: dict[int, Tensor] = field(default_factory=dict)
    """What `attend` noted, by layer."""
    documents: Documents | None = None
    """Where the decoder gets the rows as documents of one; what is recorded is told per row all the same."""

    def begin(self, facts: Facts) -> None:
        """Forget the forward before; these are the next one's tokens."""
        for kept in (self.score, self.log_beta, self.noted):
            kept.clear()
        self.valid, self.padded, self.positions, self.visual = facts.valid, facts.padded, facts.positions, facts.visual
        self.documents = facts.documents

    def stacked(self, what: str = "log_beta") -> list[Tensor]:
        """`log_beta`, `score` or `noted` of all layers, in order."""
        kept = getattr(self, what)
        return [kept[layer] for layer in sorted(kept)]


def gated(number: int, hidden: Tensor, record: GateRecord, call: AttentionCall) -> Tensor:
    """A gated layer's attention by the record's `attend`, or the model's own where that says nothing.

    `number`: the layer's among the gated ones; `hidden`: what its gate read.

    Raises:
        ValueError: where keys come from a cache.
    """
    documents, heads = record.documents, (call.query, call.key, call.value)
    query, key, value = heads if documents is None else (documents.rows(x) for x in heads)
    if query.shape[2] != key.shape[2]:
        raise ValueError("gated training attention runs without a cache; pass use_cache=False")
    assert record.positions is not None
    assert record.valid is not None
    out, noted = record.attend(
        GatedCall(
            number,
            query,
            key,
            value,
            hidden,
            output_weight(call.module),
            record.score[number],
            record.log_beta[number],
            call.scaling,
            record.positions,
            record.valid,
            record.padded,
            call.mask if record.own_mask else None,
        )
    )
    if noted is not None:
        record.noted[number] = noted
    if out is None:
        return call.plain() if documents is None else in_each(documents, call)
    out = out.transpose(1, 2).contiguous()
    return out if documents is None else documents.packed(out)


@contextmanager
def attach_gates(
    model: "PreTrainedModel",
    gates: RetentionGates,
    attend: Callable[[GatedCall], Attended] = decayed,
    *,
    budget: Float[Tensor, " batch"] | None = None,
) -> Iterator[GateRecord]:
    """Run forwards of `model` with gated attention, by decay unless told otherwise; on exit the model is as before.

    Gradients reach the gates only. Use without a cache (`use_cache=False`), one document per row (`hidden.packed` lays rows
    end to end in the decoder alone). Conditioned gates
    read `budget`, entries per head of each row.

    Raises:
        ValueError: when the gates do not fit the model or are delayed, or it is attached already.
    """
    gates.check(model)
    if gates.config.delayed:
        raise ValueError("gates that read the token behind each one (gate.delayed) rank as they are; train others")
    record = GateRecord(attend)

    def before_layer(layer: int, kwargs: dict[str, Any]) -> Attend:
        number, hidden = gates.shape.layers.index(layer), kwargs["hidden_states"]
        if record.documents is not None:
            hidden = record.documents.padded(hidden)
        score = gates.score(number, hidden, visual=record.visual, valid=record.valid, budget=budget)
        record.score[number], record.log_beta[number] = score, log_beta_from_score(score)
        return partial(gated, number, hidden, record)

    record.own_mask = family_of(model).own_mask
    with attached(model, gates.shape.layers, before_layer, before_forward=record.begin):
        yield record
