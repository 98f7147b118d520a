"""Runs arms over batches of contexts: prefill once, fork, evict, answer the turns, one row per answer."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from retention.attach.hard import evicting
from retention.cache.evicting import EvictingCache
from retention.cache.inputs import Answers
from retention.data.render import Rendered, Renderer
from retention.evaluation.arms import Arm
from retention.evaluation.protocol import Protocol
from retention.gates import RetentionGates
from retention.policies import POLICIES
from retention.policies.collect import Foresight
from retention.tasks import Task
from retention.tasks.answering import answer_turns, prefill, read_on
from retention.tasks.scorers import SCORERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]


@dataclass
class GateSet:
    """Trained gates with the seed they were trained from; `gates` is None for heuristics alone."""

    gates: RetentionGates | None
    seed: int | None = None


@dataclass
class Runner:
    """A frozen model with its renderer; runs any arm on any batch of contexts."""

    model: "PreTrainedModel"
    renderer: Renderer
    style: str

    def batches(self, task: Task, split: str, seed: int, count: int, size: int) -> Iterator[Rendered]:
        """Rendered contexts of a task, `size` at a time."""
        for start in range(0, count, size):
            examples = [task.example(seed, split, i, style=self.style) for i in range(start, min(start + size, count))]
            yield self.renderer.render(examples)

    def run(
        self, batch: Rendered, arms: list[Arm], gates: RetentionGates | None
    ) -> Iterator[tuple[Arm, EvictingCache, list[Row]]]:
        """Each arm with its cache right after the eviction of the context, and its rows.

        The arms' protocols agree in their prefill. One-shot arms fork one; streaming arms prefill on their own,
        evicting after every image.
        """
        protocol = arms[0].protocol
        if protocol.trigger != "after_prefill":
            for arm in arms:
                with self._open(arm, gates) as cache:
                    yield arm, *self._answer(arm, cache, batch, prefilled=False)
            return
        collectors = tuple({name for arm in arms for name in arm.policy.collectors})
        packed = any(arm.cache.positions == "packed" for arm in arms)
        shared = {"extra_collectors": collectors, "packed": packed, "tokenizer": self.renderer.tokenizer}
        with evicting(self.model, POLICIES["full"](), gates=gates, **shared) as source:
            self._prefill(source, batch, protocol)
            for arm in arms:
                yield arm, *self._answer(arm, source.fork(arm.policy, arm.cache), batch, prefilled=True)

    def _open(self, arm: Arm, gates: RetentionGates | None) -> Any:
        own, tokenizer = gates if arm.needs_gates else None, self.renderer.tokenizer
        return evicting(self.model, arm.policy, arm.cache, gates=own, tokenizer=tokenizer)

    def _prefill(self, cache: EvictingCache, batch: Rendered, protocol: Protocol) -> None:
        prefill(self.model, cache, batch, pad=self.renderer.pad, first_question=protocol.question == "aware")

    def _answer(
        self, arm: Arm, cache: EvictingCache, batch: Rendered, *, prefilled: bool
    ) -> tuple[EvictingCache, list[Row]]:
        started = time.perf_counter()
        if arm.policy.needs_evidence:
            cache.mark_evidence(_evidence_mask(batch))
        if isinstance(arm.policy.second_pass(), Foresight):
            cache.tokens.inputs.answers = dialogues(batch)
        if prefilled:
            cache.evict()
        else:
            self._prefill(cache, batch, arm.protocol)
        read_on(self.model, cache, batch)
        after = cache.fork()
        tokens = answer_turns(self.model, cache, batch, pad=self.renderer.pad)
        seconds = (time.perf_counter() - started) / len(batch.examples)
        return after, self._rows(arm, after, batch, tokens, seconds)

    def _rows(
        self,
        arm: Arm,
        cache: EvictingCache,
        batch: Rendered,
        tokens: list[list[list[int]]],
        seconds: float,
    ) -> list[Row]:
        kept, seen, table = cache.kept().sum((0, 2)).tolist(), cache.seen().tolist(), cache.kept_table()
        heads = cache.shape.num_layers * cache.shape.num_kv_heads
        ledger, count = cache.bytes(), len(batch.examples)
        full = cache.entry_bytes * heads
        budgets = cache.resolved or seen
        rows = []
        for i, example in enumerate(batch.examples):
            for turn, asked in enumerate(example.turns):
                said = self.renderer.decode(tokens[i][turn])
                rows.append(
                    {
                        "policy": arm.name,
                        "scope": arm.scope,
                        "protocol": str(arm.protocol),
                        "positions": arm.protocol.positions,
                        "budget": {"requested": arm.budget, "resolved": budgets[i], "fraction": budgets[i] / seen[i]},
                        "example_id": example.id,
                        "turn": turn,
                        "n_turns": example.n_turns,
                        "query_position": "after" if turn == 0 else "deferred_turn",
                        "question": asked.question,
                        "prediction": said,
                        "answer": asked.answer,
                        "scorer": asked.scorer,
                        "score": SCORERS[asked.scorer](said, asked.answer),
                        "chance": example.meta["chance"],
                        "kept": kept[i],
                        "seen": seen[i],
                        "entries_full": seen[i] * heads,
                        "evidence_recall": evidence_recall(table[:, i], batch.evidence[i][turn]),
                        "bytes": {
                            "full": full * seen[i],
                            "kept": ledger.total // count,
                            "kept_logical": ledger.logical_total // count,
                            "peak": ledger.peak // count,
                        },
                        "seconds_per_context": round(seconds, 5),
                        "error": None,
                    }
                )
        return rows


def _evidence_mask(batch: Rendered) -> Bool[Tensor, "batch positions"]:
    """What any turn of each context asks about, by position."""
    rows = [sorted({p for turn in turns for p in turn or []}) for turns in batch.evidence]
    mask = torch.zeros(len(rows), 1 + max((row[-1] for row in rows if row), default=0), dtype=torch.bool)
    for row, places in enumerate(rows):
        mask[row, places] = True
    return mask


def dialogues(batch: Rendered) -> Answers:
    """Each context's questions with their reference answers, one after the other, as a model that is right has them."""
    rows = [
        [
            (token, i >= len(question) - 1 and i + 1 < len(question) + len(answer))
            for question, answer in zip(turns.questions, turns.answers, strict=True)
            for i, token in enumerate(question + answer)
        ]
        for turns in batch.turns
    ]
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[(0, False)] * (longest - len(row))] for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return Answers(padded[..., 0], torch.arange(longest) < lengths[:, None], padded[..., 1].bool())


def evidence_recall(
    table: Bool[Tensor, "layers kv_heads positions"], evidence: list[int] | None
) -> dict[str, float | None]:
    """Share of a turn's evidence held in any layer and head, and on average over them; missing without positions."""
    if not evidence:
        return {"any": None, "mean": None}
    held = table[..., torch.tensor(evidence)]
    return {"any": float(held.any(0).any(0).float().mean()), "mean": float(held.float().mean())}
