"""One run's loop over tasks, gate sets, protocols and batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from retention.data.render import Rendered
from retention.evaluation.arms import Arm, full_arm, make_arm, mean_counts, needs_gates
from retention.evaluation.config import QUOTA, EvalConfig
from retention.evaluation.diagnostics import Diagnostics
from retention.evaluation.protocol import Protocol
from retention.evaluation.ranks import rank, world_size
from retention.evaluation.runner import GateSet, Runner
from retention.evaluation.store import RowStore
from retention.policies import policy_of


class Session:
    """One run's loop over tasks, gate sets, protocols and batches; `diagnostics` look at the first batch of a task."""

    def __init__(
        self,
        config: EvalConfig,
        runner: Runner,
        sets: list[GateSet],
        store: RowStore,
        diagnostics: Diagnostics | None = None,
    ) -> None:
        self.config, self.runner, self.sets, self.store = config, runner, sets, store
        self.diagnostics = diagnostics

    def run(self) -> None:
        """Everything that is not done yet, with a progress bar."""
        c, part = self.config, (rank(), world_size())
        counts = {task: c.task[task].available(c.split, c.examples) for task in c.tasks}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as bar:
            groups = _by_prefill([Protocol.parse(text) for text in c.protocols])
            own = sum(len(range(part[0], count, part[1])) for count in counts.values())
            work = bar.add_task("evaluate", total=own * len(self.sets) * len(groups))
            for task in c.tasks:
                for number, gate_set in enumerate(self.sets):
                    quotas = self._quotas(task, gate_set)
                    for protocols in groups:
                        arms = [arm for p in protocols for arm in self._arms(p, quotas, first=number == 0)]
                        bar.update(work, description=f"{task} {' '.join(protocols[0].prefill)} seed {gate_set.seed}")
                        asked = (c.task[task], c.split, c.seed, counts[task], c.batch_size)
                        for place, batch in enumerate(self.runner.batches(*asked, part=part)):
                            self._batch(task, batch, arms, gate_set, first=number == place == part[0] == 0)
                            bar.advance(work, len(batch.examples))

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
        ranked = policy_of(gate_set.gates.objective)
        arms = [make_arm(c, ranked, budget, Protocol(), None) for budget in c.budgets]
        for arm in arms:
            arm.cache = replace(arm.cache, allocator="global")
        counts: dict[str, Any] = {}
        batches = list(self.runner.batches(c.task[task], "val", c.seed, c.quota_examples, c.quota_examples))
        for arm, cache, _ in self.runner.run(batches[0], arms, gate_set.gates):
            counts[arm.budget] = mean_counts(cache.kept())
        return counts

    def _batch(self, task: str, batch: Rendered, arms: list[Arm], gate_set: GateSet, *, first: bool) -> None:
        """Run what is missing of one batch and store its rows; look at the first of a task."""
        ids = [example.id for example in batch.examples]
        look = self.diagnostics if first else None

        def stored(arm: Arm) -> bool:
            seed = gate_set.seed if arm.needs_gates else None
            return self.store.has((task, arm.name, str(arm.protocol), arm.budget, seed), ids)

        missing = [arm for arm in arms if not stored(arm) or (look is not None and look.wants(task, arm))]
        if not missing:
            return
        for arm, cache, rows in self.runner.run(batch, missing, gate_set.gates):
            if look is not None and look.wants(task, arm):
                look.note(task, arm, cache, batch)
                look.note_missing(task, arm, self.runner.missing)
            if not stored(arm):
                seed = gate_set.seed if arm.needs_gates else None
                run = {"run_id": Path(self.config.output_dir).name}
                known = {"task": task, "split": self.config.split, "seed_data": self.config.seed, "seed_train": seed}
                self.store.add(self.config.task[task].judged([run | known | row for row in rows]))
        if look is not None:
            look.note_contexts(task, batch, gate_set.gates)


def _by_prefill(protocols: list[Protocol]) -> list[list[Protocol]]:
    """Protocols that can share a prefill, together."""
    groups: dict[tuple[str, str], list[Protocol]] = {}
    for protocol in protocols:
        groups.setdefault(protocol.prefill, []).append(protocol)
    return list(groups.values())
