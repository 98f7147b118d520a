"""Everything an evaluation is told; defaults are the demo on the embedded model."""

import dataclasses
from dataclasses import dataclass, field

from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.evaluation.protocol import Protocol
from retention.models.load import ModelConfig
from retention.policies import POLICIES, Policy
from retention.tasks import TASKS, Task

QUOTA = "quota"
"""The preset, and the start of names such as `quota+keydiff`, whose shares are measured on trained gates."""
MEMORY = {"memory+": "memory", "memory_paid+": "memory_paid", "refund+": "refund"}
"""What becomes of evicted entries, by the prefix of a policy's name."""


def base_name(name: str) -> str:
    """The preset a name such as `quota+keydiff` or `memory+trim_kv` is built on."""
    return name.rpartition("+")[2]


def prefix_of(name: str) -> str:
    """What stands before the preset, with its plus."""
    return name.removesuffix(base_name(name))


def default_policies() -> dict[str, Policy]:
    """Every policy with its published settings."""
    return {name: policy() for name, policy in POLICIES.items()}


def default_tasks() -> dict[str, Task]:
    """Every task with its own defaults."""
    return {name: task() for name, task in TASKS.items()}


@dataclass
class EvalConfig:
    """An evaluation: model, gates, and the product of tasks x protocols x policies x budgets."""

    model: ModelConfig = field(default_factory=ModelConfig)
    gates: str | None = "outputs/latest/gates"
    """Gate artefacts: a folder, a hub id, a glob pattern or several joined by commas; null evaluates heuristics only."""
    tasks: list[str] = field(default_factory=lambda: ["needles"])
    """Names of presets in `task`."""
    policies: list[str] = field(default_factory=lambda: ["db_trim_kv", "trim_kv", "keydiff", "snapkv", "h2o", "random"])
    """Names of presets in `policy`; full and random are always there. `quota` and `quota+X` give keydiff, or X, the gates'
    own shares per layer and head; `memory+X` lets X's evicted entries flow into the gates' memory, `memory_paid+X` takes its bytes out of X's
    entries, and `refund+X` is X without a memory, its bytes spent on more entries."""
    budgets: list[str] = field(default_factory=lambda: ["10%", "5%", "2.5%"])
    """Tokens per head, fractions of the context, or bytes per sequence."""
    protocols: list[str] = field(default_factory=lambda: ["agnostic"])
    """agnostic or aware, one_shot or streaming, original or packed, joined by `+`."""
    policy: dict[str, Policy] = field(default_factory=default_policies)
    """Settings of every policy, by preset name."""
    task: dict[str, Task] = field(default_factory=default_tasks)
    """Settings of every task, by preset name."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Protection and floors, the same for every policy; budget, positions and trigger come from budgets and protocols."""
    split: str = "test"
    """test for results, val for choosing hyper-parameters."""
    examples: int = 64
    """Contexts per task."""
    batch_size: int = 32
    """Contexts evaluated together."""
    teacher: bool = False
    """Hold every answer against the full cache on the reference answer (KL, top-1 agreement, missing mass): a forward per
    turn more for every arm, and the full cache's attention rows and logits in memory. Where the budget holds while answers
    are written, on the full cache's own greedy answer (KL and agreement alone): every arm reads it token by token."""
    quota_examples: int = 32
    """Validation contexts that the quotas are measured on."""
    seed: int = 0
    """Seed of the examples."""
    output_dir: str = "outputs/eval/run"
    """Where results go; rows that are there already are not computed again."""
    experiment: str | None = None
    """Name of the experiment preset, for the record."""
    report: list[str] = field(default_factory=list)
    """Folders of evaluations to write the report of anew, or to compare in one; nothing is evaluated then."""

    def __post_init__(self) -> None:
        for text in self.budgets:
            Budget.parse(text)
        for text in self.protocols:
            Protocol.parse(text)
        for policy in self.policy.values():
            policy.bind(self.policy)
        for name in self.policies:
            prefixes = (f"{QUOTA}+", *MEMORY)
            fits = prefix_of(name) in (("",) if base_name(name) == QUOTA else ("", *prefixes))
            if base_name(name) not in self.policy or not fits:
                raise ValueError(
                    f"expected policies among {', '.join(self.policy)} (or {', '.join(prefixes)} before one of them), got {name!r}"
                )
        for name in self.tasks:
            if name not in self.task:
                raise ValueError(f"expected tasks among {', '.join(self.task)}, got {name!r}")
        for name in ("tasks", "policies", "budgets", "protocols"):
            if not getattr(self, name):
                raise ValueError(f"expected at least one entry in {name}, got none")
        if self.split not in ("test", "val"):
            raise ValueError(f"expected split test or val, got {self.split!r}")
        if min(self.examples, self.batch_size, self.quota_examples) < 1:
            raise ValueError("expected examples, batch_size and quota_examples of at least 1")

    def cache_for(self, budget: str, protocol: Protocol) -> CacheConfig:
        """The cache of one cell."""
        chunked = protocol.trigger != "after_prefill"
        return dataclasses.replace(
            self.cache, budget=Budget.parse(budget), positions=protocol.positions, chunk_by_image=chunked
        )
