"""How close an arm stays to the full cache on the reference answers: KL, top-1 agreement, missing mass, weighted recall.

Both caches read the questions with their reference answers. Every further arm costs one forward per turn, and a batch one
more of the full cache with fp32 attention rows; these rows and the full cache's logits are held until the batch is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retention.attach.forward import tail_logits
from retention.attach.hooks import Attend, layer_hooks
from retention.attach.plain import AttentionCall
from retention.cache.evicting import EvictingCache
from retention.data.collate import left_pad
from retention.data.render import Rendered
from retention.evaluation.holding import visual_positions
from retention.models.family import decoder_of
from retention.ops.observe import attention_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]
UNKNOWN: Row = {"kl_teacher": None, "top1_agree": None, "missing_mass": None}
"""What an answer says of its fidelity where that was not measured."""


@dataclass
class Taught:
    """What the full cache says to the answers of one turn of a batch."""

    logits: Float[Tensor, "batch count vocabulary"]
    """For the answer's tokens, which are the last of the `count`."""
    attention: Float[Tensor, "layers batch heads count positions"]
    """From the token before each token of the answer to every position, by query head."""


@dataclass
class Missing:
    """Full attention on what was evicted, on average over contexts, turns and tokens of answers."""

    share: Float[Tensor, "layers heads 2"]
    """By query head, on text and on images."""

    def save(self, file: Path) -> Path:
        """Write it as an array `missing_mass`."""
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, missing_mass=self.share.numpy())
        return file


@dataclass
class Teacher:
    """The full cache's side of one batch; `judge` holds an arm's cache against it."""

    model: "PreTrainedModel"
    batch: Rendered
    pad: int
    turns: list[Taught]

    @classmethod
    def of(cls, model: "PreTrainedModel", full: EvictingCache, batch: Rendered, pad: int) -> "Teacher":
        """Let a full cache that has read the contexts read their turns, inside the block it comes from."""
        turns = []
        for _, asked, logits, rows in _read(model, full, batch, pad, listening=True):
            laid = [_by_position(layer, asked, number) for number, layer in enumerate(rows)]
            turns.append(Taught(logits, torch.stack(laid)))
        return cls(model, batch, pad, turns)

    def judge(self, cache: EvictingCache) -> tuple[list[list[Row]], Missing | None]:
        """Per context and turn what rows say of fidelity, and the missing mass by layer and head.

        `cache` holds what an arm kept of the contexts; it stays as it is. Turns without a score or an answer tell nothing.
        """
        table, visual, seen = cache.kept_table(), visual_positions(cache), cache.seen().tolist()
        found: list[list[Row]] = [[] for _ in self.batch.examples]
        shares = []
        for turn, _, logits, _ in _read(self.model, cache, self.batch, self.pad, listening=False):
            taught = self.turns[turn]
            for i, example in enumerate(self.batch.examples):
                count = len(self.batch.turns[i].answers[turn])
                if not count or not example.turns[turn].scored:
                    found[i].append(dict(UNKNOWN))
                    continue
                # what follows the context is held by all
                rows, kept = taught.attention[:, i, :, -count:, : seen[i]], table[:, i, :, : seen[i]]
                share = missing_mass(rows, kept, visual[i, : seen[i]])
                shares.append(share.mean(2))
                full, own = taught.logits[i, -count:], logits[i, -count:]
                told: Row = {"kl_teacher": round(divergence(full, own), 9), "top1_agree": agreement(full, own)}
                told["weighted"] = weighted_recall(rows, kept, self.batch.evidence[i][turn])
                found[i].append(told | {"missing_mass": _told(share)})
        return found, Missing(torch.stack(shares).mean(0).cpu()) if shares else None


def divergence(full: Float[Tensor, "tokens vocabulary"], policy: Float[Tensor, "tokens vocabulary"]) -> float:
    """Mean over tokens of KL(p_full || p_policy), full vocabulary, in fp32 nats."""
    p, q = full.float().log_softmax(-1), policy.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def agreement(full: Float[Tensor, "tokens vocabulary"], policy: Float[Tensor, "tokens vocabulary"]) -> float:
    """Share of tokens at which both would say the same."""
    return float((full.argmax(-1) == policy.argmax(-1)).float().mean())


def missing_mass(
    rows: Float[Tensor, "layers heads tokens positions"],
    kept: Bool[Tensor, "layers kv_heads positions"],
    visual: Bool[Tensor, " positions"],
) -> Float[Tensor, "layers heads tokens 2"]:
    """Attention of full rows on positions that a head's entry no longer holds, on text and on images."""
    gone = ~kept.repeat_interleave(rows.shape[1] // kept.shape[1], 1)
    kinds = torch.stack([~visual, visual], -1).to(rows.dtype)
    return (rows * gone[:, :, None]) @ kinds


def weighted_recall(
    rows: Float[Tensor, "layers heads tokens positions"],
    kept: Bool[Tensor, "layers kv_heads positions"],
    evidence: list[int] | None,
) -> float | None:
    """Share of the evidence that is held, averaged over (layer, head) by the full attention on it; None without any."""
    if not evidence:
        return None
    weight = rows[..., evidence].sum((-1, -2)).unflatten(1, (kept.shape[1], -1)).sum(-1)
    share = kept[..., evidence].float().mean(-1)
    total = float(weight.sum())
    return float((weight * share).sum()) / total if total > 0 else None


def _told(share: Float[Tensor, "layers heads tokens 2"]) -> Row:
    """Missing mass as a row has it: over all layers, heads and tokens, by modality, and by layer."""
    whole = share.sum(-1)
    spread = {"mean": whole.mean(), "p90": whole.flatten().quantile(0.9)}
    kinds = {"text": share[..., 0].mean(), "image": share[..., 1].mean()}
    told: Row = {name: round(float(value), 6) for name, value in (spread | kinds).items()}
    return told | {"by_layer": [round(float(value), 6) for value in whole.mean((1, 2))]}


def _read(
    model: "PreTrainedModel", cache: EvictingCache, batch: Rendered, pad: int, *, listening: bool
) -> Iterator[tuple[int, EvictingCache, Tensor, list[Tensor]]]:
    """Every turn with its reference answer: number, the cache that read it, logits and attention rows of the answer.

    As answers are written: one after the other, or where turns are independent each by itself; nothing is evicted.
    """
    alone = batch.examples[0].independent
    cache, carried = cache.fork(), list[list[int]]([[]] * len(batch.examples))
    for turn in range(len(batch.turns[0].questions)):
        asked = cache.fork() if alone else cache
        answers = [turns.answers[turn] for turns in batch.turns]
        asking = zip(carried, batch.turns, answers, strict=True)
        ids = [before + turns.questions[turn] + answer[:-1] for before, turns, answer in asking]
        inputs = {"input_ids": left_pad(ids, pad), "attention_mask": left_pad([[1] * len(row) for row in ids], 0)}
        count = max(1, *map(len, answers))
        with asked.hold(), _heard(model, asked, count if listening else 0) as rows:
            logits = tail_logits(model, asked, inputs, count)
        yield turn, asked, logits, rows
        carried = [[] if alone else answer[-1:] for answer in answers]


@contextmanager
def _heard(model: "PreTrainedModel", cache: EvictingCache, count: int) -> Iterator[list[Tensor]]:
    """Inside, the attention rows of the last `count` queries of a forward into this cache are noted, layer by layer."""
    rows: list[Tensor] = []

    def before_layer(number: int, kwargs: dict[str, Any]) -> Attend:
        inner: Attend = kwargs["retention_attend"]

        def attend(call: AttentionCall) -> Tensor:
            layer: Any = cache.layers[number]
            with layer.seeing(call.mask if cache.own_mask else None):
                visible = layer.visible(count)
            rows.append(attention_rows(call.query[:, :, -count:], layer.read()[0], visible, call.scaling))
            return inner(call)

        return attend

    with layer_hooks(decoder_of(model), cache.shape.layers if count else (), before_layer):
        yield rows


def _by_position(
    rows: Float[Tensor, "batch kv_heads groups tokens keys"], cache: EvictingCache, number: int
) -> Float[Tensor, "batch heads tokens positions"]:
    """Rows over a full cache's entries, laid out by the positions of these."""
    state, seen = cache.evicting_layers[number].state(), cache.columns
    place = torch.where(state.valid, state.positions, seen).expand(*rows.shape[:2], -1)
    laid = torch.zeros(*rows.shape[:4], seen + 1, dtype=rows.dtype, device=rows.device)
    return laid.scatter(-1, place[:, :, None, None].expand(rows.shape), rows)[..., :seen].flatten(1, 2)
