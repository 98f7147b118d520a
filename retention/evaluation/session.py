"""One run's loop over tasks, gate sets, protocols and batches, and what its pictures need."""

from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from retention.data.render import Rendered
from retention.evaluation.arms import Arm, full_arm, make_arm, mean_counts, needs_gates
from retention.evaluation.config import QUOTA, EvalConfig
from retention.evaluation.diagnostics import look_at_patches, survival
from retention.evaluation.protocol import Protocol
from retention.evaluation.runner import GateSet, Runner
from retention.evaluation.store import RowStore


def picture_budget(config: EvalConfig) -> str:
    """The budget that pictures and sample answers are shown at: the one nearest to 5 %."""

    def distance(text: str) -> float:
        return abs(float(text.rstrip("%")) / 100 - 0.05) if text.endswith("%") else 1.0

    return min(config.budgets, key=distance)


class Session:
    """One run's loop over tasks, gate sets, protocols and batches, and what pictures need of it."""

    def __init__(self, config: EvalConfig, runner: Runner, sets: list[GateSet], store: RowStore) -> None:
        self.config, self.runner, self.sets, self.store = config, runner, sets, store
        self.survival: dict[str, np.ndarray] = {}
        self.patches: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.picture_budget = picture_budget(config)

    def run(self) -> None:
        """Everything that is not done yet, with a progress bar."""
        c = self.config
        batches = -(-c.examples // c.batch_size)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as bar:
            work = bar.add_task("evaluate", total=len(c.tasks) * len(self.sets) * len(c.protocols) * batches)
            for task in c.tasks:
                for number, gate_set in enumerate(self.sets):
                    quotas = self._quotas(task, gate_set)
                    for protocol in map(Protocol.parse, c.protocols):
                        arms = self._arms(protocol, quotas, first=number == 0)
                        bar.update(work, description=f"{task} {protocol.question} seed {gate_set.seed}")
                        for batch in self.runner.batches(c.task[task], c.split, c.seed, c.examples, c.batch_size):
                            self._batch(task, batch, arms, protocol, gate_set)
                            bar.advance(work)

    def _arms(self, protocol: Protocol, quotas: dict[str, Any], *, first: bool) -> list[Arm]:
        """Arms of one gate set; what does not depend on gates runs with the first set only."""
        names = [
            n for n in dict.fromkeys(self.config.policies) if n != "full" and (first or needs_gates(self.config, n))
        ]
        arms = [make_arm(self.config, n, b, protocol, quotas.get(b)) for n in names for b in self.config.budgets]
        return [full_arm(self.config, protocol), *arms] if first else arms

    def _quotas(self, task: str, gate_set: GateSet) -> dict[str, Any]:
        """Mean kept entries per layer and head of the gates under the global pool, on validation contexts, per budget."""
        c = self.config
        if gate_set.gates is None or not any(n.startswith(QUOTA) for n in c.policies):
            return {}
        protocol = Protocol()
        arms = [make_arm(c, "db_trim_kv", budget, protocol, None) for budget in c.budgets]
        counts: dict[str, Any] = {}
        batches = list(self.runner.batches(c.task[task], "val", c.seed, c.quota_examples, c.quota_examples))
        for arm, cache, _ in self.runner.run(batches[0], arms, protocol, gate_set.gates):
            counts[arm.budget] = mean_counts(cache.kept())
        return counts

    def _batch(self, task: str, batch: Rendered, arms: list[Arm], protocol: Protocol, gate_set: GateSet) -> None:
        ids = [example.id for example in batch.examples]
        missing = []
        for arm in arms:
            seed = gate_set.seed if arm.needs_gates else None
            if not self.store.has((task, arm.name, str(protocol), arm.budget, seed), ids) or self._pictured(
                arm, protocol
            ):
                missing.append(arm)
        if not missing:
            return
        for arm, cache, rows in self.runner.run(batch, missing, protocol, gate_set.gates):
            self._look(arm, cache, protocol)
            seed = gate_set.seed if arm.needs_gates else None
            named = [
                {"task": task, "split": self.config.split, "seed_data": self.config.seed, "seed_train": seed, **row}
                for row in rows
            ]
            if not self.store.has((task, arm.name, str(protocol), arm.budget, seed), ids):
                self.store.add(named)
        if self.patches is None and gate_set.gates is not None:
            self.patches = look_at_patches(self.runner.model, batch, gate_set.gates)

    def _pictured(self, arm: Arm, protocol: Protocol) -> bool:
        """Whether a picture still needs this arm's cache (also on a run that only adds rows)."""
        first = str(protocol) == str(Protocol.parse(self.config.protocols[0]))
        return first and arm.budget == self.picture_budget and f"{arm.name} at {arm.budget}" not in self.survival

    def _look(self, arm: Arm, cache: Any, protocol: Protocol) -> None:
        if self._pictured(arm, protocol):
            self.survival[f"{arm.name} at {arm.budget}"] = survival(cache)
