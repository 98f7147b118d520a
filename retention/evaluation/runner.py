"""Runs arms over batches of contexts: prefill once, fork, evict, answer the turns, one row per answer."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from retention.attach.forward import end_tokens
from retention.attach.hard import evicting
from retention.attach.stretch import stretched
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache
from retention.cache.inputs import Answers
from retention.data.example import Example
from retention.data.render import Rendered, Renderer
from retention.evaluation.arms import Arm
from retention.evaluation.batches import batches_of
from retention.evaluation.checks import check_kept
from retention.evaluation.fidelity import UNKNOWN, Missing, Teacher
from retention.evaluation.holding import depth, distance, evidence_recall, kept_by, visual_positions
from retention.evaluation.protocol import Protocol
from retention.evaluation.written import Written, until
from retention.gates import RetentionGates
from retention.policies import POLICIES
from retention.policies.collect import Foresight
from retention.tasks import Task
from retention.tasks.answering import answer_turns, prefill, read_on
from retention.tasks.scorers import SCORERS, readable

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
    teacher: bool = False
    """Whether rows are held against the full cache on the reference answers (`fidelity`), or where the budget holds while
    answers are written on its own (`written`)."""
    missing: Missing | None = None
    """Missing mass of the arm that was run last, where it was measured."""

    def batches(
        self, task: Task, split: str, seed: int, count: int, size: int, *, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Rendered]:
        """Rendered contexts of a task, at most `size` at a time; `part` (i, n): every n-th from i on."""
        task = task.measured(self.renderer.length)
        numbers = range(part[0], task.available(split, count), part[1])
        examples = (task.example(seed, split, number, style=self.style) for number in numbers)
        for batch in batches_of(examples, size):
            yield self.renderer.render(batch)

    def run(
        self, batch: Rendered, arms: list[Arm], gates: RetentionGates | None
    ) -> Iterator[tuple[Arm, EvictingCache, list[Row]]]:
        """Each arm with its cache right after the eviction of the context, and its rows.

        The arms' protocols agree in their prefill. One-shot arms fork one; streaming arms prefill on their own,
        evicting after every image. Positions are stretched as the contexts say.
        """
        with stretched(self.model, batch.examples[0].stretch):
            yield from self._arms(batch, arms, gates)

    def _arms(
        self, batch: Rendered, arms: list[Arm], gates: RetentionGates | None
    ) -> Iterator[tuple[Arm, EvictingCache, list[Row]]]:
        protocol = arms[0].protocol
        if protocol.trigger != "after_prefill":
            teacher = None
            if self.teacher:
                with evicting(self.model, POLICIES["full"](), tokenizer=self.renderer.tokenizer) as source:
                    self._prefill(source, batch, protocol)
                    teacher = self._teacher(source, batch)
            for arm in arms:
                with self._open(arm, gates) as cache:
                    yield arm, *self._answer(arm, cache, batch, teacher, prefilled=False)
            return
        collectors = tuple({name for arm in arms for name in arm.policy.collectors})
        packed = any(arm.cache.positions == "packed" for arm in arms)
        shared = {"extra_collectors": collectors, "packed": packed, "tokenizer": self.renderer.tokenizer}
        with evicting(self.model, POLICIES["full"](), gates=gates, **shared) as source:
            started = time.perf_counter()
            self._prefill(source, batch, protocol)
            spent = time.perf_counter() - started
            teacher = self._teacher(source, batch) if self.teacher else None
            for arm in arms:
                fork = source.fork(arm.policy, arm.cache)
                yield arm, *self._answer(arm, fork, batch, teacher, prefilled=True, spent=spent)

    def _teacher(self, source: EvictingCache, batch: Rendered) -> Teacher | Written:
        full = source.fork(POLICIES["full"](), CacheConfig())
        read_on(self.model, full, batch)
        kind = Written if batch.examples[0].evicts_answers else Teacher
        return kind.of(self.model, full, batch, self.renderer.pad)

    def _open(self, arm: Arm, gates: RetentionGates | None) -> Any:
        own, tokenizer = gates if arm.needs_gates else None, self.renderer.tokenizer
        return evicting(self.model, arm.policy, arm.cache, gates=own, tokenizer=tokenizer)

    def _prefill(self, cache: EvictingCache, batch: Rendered, protocol: Protocol) -> None:
        prefill(self.model, cache, batch, pad=self.renderer.pad, first_question=protocol.question == "aware")

    def _answer(
        self,
        arm: Arm,
        cache: EvictingCache,
        batch: Rendered,
        teacher: Teacher | Written | None,
        *,
        prefilled: bool,
        spent: float = 0.0,
    ) -> tuple[EvictingCache, list[Row]]:
        """`spent` are the seconds of a prefill that arms share."""
        whole = cache.bytes().logical_total if prefilled and batch.later is None else None
        started = time.perf_counter()
        _check_decoding(arm, batch.examples[0])
        if arm.policy.needs_evidence:
            cache.mark_evidence(_evidence_mask(batch))
        if isinstance(arm.policy.second_pass(), Foresight):
            cache.tokens.inputs.answers = dialogues(batch)
        if prefilled:
            cache.evict()
        else:
            self._prefill(cache, batch, arm.protocol)
        read_on(self.model, cache, batch)
        after, read = cache.fork(), time.perf_counter()
        tokens = answer_turns(self.model, cache, batch, pad=self.renderer.pad)
        ended, count = time.perf_counter(), len(batch.examples)
        check_kept(arm.name, after, batch.examples)
        if batch.examples[0].evicts_answers and not arm.policy.steps:  # these may hold a growing part of each head
            check_kept(arm.name, cache, batch.examples, newer=arm.cache.evict_every or 0)
        written = sum(max(map(len, turn)) for turn in zip(*tokens, strict=True))
        ms = {"prefill": 1e3 * (spent + read - started) / count, "decode_per_token": 1e3 * (ended - read) / written}
        rows = self._rows(arm, after, batch, tokens, (ended - started) / count, whole)
        told, self.missing = ([], None) if teacher is None else teacher.judge(after)
        for row, found in zip(rows, [found for own in told for found in own] or [UNKNOWN] * len(rows), strict=True):
            row["evidence_recall"]["weighted"] = found.get("weighted")
            row |= {name: found[name] for name in UNKNOWN}
            row["ms"] = {name: round(value, 3) for name, value in ms.items()}
        return after, rows

    def _rows(
        self,
        arm: Arm,
        cache: EvictingCache,
        batch: Rendered,
        tokens: list[list[list[int]]],
        seconds: float,
        whole: int | None,
    ) -> list[Row]:
        """`whole` are the logical bytes before the only eviction, the most there were at once; None where not known."""
        kept, seen, table = cache.kept().sum((0, 2)).tolist(), cache.seen().tolist(), cache.kept_table()
        parts, settings = kept_by(table, visual_positions(cache)), asdict(arm.policy)
        heads = cache.shape.num_layers * cache.shape.num_kv_heads
        ledger, count = cache.bytes(), len(batch.examples)
        full = cache.entry_bytes * heads
        budgets = cache.resolved or seen
        ends = end_tokens(self.model)
        rows = []
        for i, example in enumerate(batch.examples):
            for turn, asked in enumerate(example.turns):
                written = until(tokens[i][turn], ends)
                said = self.renderer.decode(written)
                rows.append(
                    {
                        "policy": arm.name,
                        "policy_args": settings,
                        "scope": arm.scope,
                        "protocol": str(arm.protocol),
                        "axes": axes(arm, example),
                        "positions": arm.protocol.positions,
                        "budget": {"requested": arm.budget, "resolved": budgets[i], "fraction": budgets[i] / seen[i]},
                        "example_id": example.id,
                        "variant": example.meta.get("variant"),
                        "tier": example.meta.get("tier"),
                        "turn": turn,
                        "n_turns": example.n_turns,
                        "cluster": example.meta.get("cluster", example.id),
                        "groups": example.meta.get("groups", {}),
                        "comparable": example.meta.get("comparable", True),
                        "query_position": _position(example, turn),
                        "question": asked.question,
                        "prediction": said,
                        "answer": asked.answer,
                        "scorer": asked.scorer,
                        "scored": asked.scored,
                        "score": SCORERS[asked.scorer](said, asked.answer, asked.choices),
                        "readable": readable(asked.scorer, said, asked.choices),
                        "generated": len(written),
                        "cut_off": not ends or written[-1] not in ends,
                        "chance": example.meta["chance"],
                        "kept": kept[i],
                        "kept_by": parts[i],
                        "seen": seen[i],
                        "entries_full": seen[i] * heads,
                        "evidence_recall": evidence_recall(table[:, i], batch.evidence[i][turn]),
                        "depth": depth(batch.evidence[i][turn], batch.lengths[i]),
                        "distance": distance(batch.evidence[i][turn], seen[i], example.stretch),
                        "bytes": {
                            "full": full * seen[i],
                            "kept": ledger.total // count,
                            "kept_logical": ledger.logical_total // count,
                            "peak": ledger.peak // count,
                            "peak_logical": None if whole is None else whole // count,
                            "items": {item: n // count for item, n in ledger.physical.items() if n},
                        },
                        "seconds_per_context": round(seconds, 5),
                        "error": None,
                    }
                )
        return rows


def _check_decoding(arm: Arm, example: Example) -> None:
    """Raises ValueError where a budget is to hold while answers are written and nothing would evict."""
    evicts = arm.name == "full" or arm.policy.steps or arm.cache.evict_every is not None
    if example.evicts_answers and not evicts:
        raise ValueError(
            f"{example.id} is about decoding under a budget and cache.evict_every is null; set cache.evict_every=64"
        )


def axes(arm: Arm, example: Example) -> dict[str, str]:
    """The protocol's four choices as this example has them: of turns, and whether eviction goes on while it is answered."""
    turns = "single" if example.n_turns == 1 else "cloned" if example.independent else "multi"
    every = 1 if arm.policy.steps else arm.cache.evict_every
    decoding = f"+decode({every})" if example.evicts_answers and every and arm.policy.evicts else ""
    protocol = arm.protocol
    told = {"question": protocol.question, "turns": turns, "trigger": protocol.trigger + decoding}
    return told | {"positions": protocol.positions}


def _position(example: Example, turn: int) -> str:
    """Where a turn's question stands."""
    if turn and not example.independent:
        return "deferred_turn"
    return "before" if example.query_position == "before" else "after"


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
