"""Everything a training run is told; defaults follow the published recipes, `configs/` holds the demo's."""

from dataclasses import dataclass, field

from retention.budget import Budget
from retention.gates import GateConfig
from retention.gates.dbtrim import DBTrim
from retention.memory import MemoryConfig, NoMemory
from retention.models.load import ModelConfig
from retention.objectives import Objective
from retention.objectives.distillation import Distillation
from retention.policies import POLICIES
from retention.tasks import Task
from retention.tasks.needles import Needles

LOGGERS = ("wandb", "csv")


@dataclass
class DataConfig:
    """How training and validation examples are drawn and batched."""

    batch_size: int = 8
    """Contexts per step."""
    n_turns: int | None = 12
    """Questions per training context; null keeps the task's own."""
    seed: int = 0
    """Seed of the examples, apart from the seed of the gates."""
    val_examples: int = 32
    """Validation contexts for hard eviction."""
    num_workers: int = 0
    """Processes that render batches."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "val_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected data.{name} of at least 1, got {getattr(self, name)}")


STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed")


@dataclass
class TrainerConfig:
    """Optimiser, schedule and how often to look and to save."""

    max_steps: int = 2000
    """Optimisation steps."""
    lr: float = 2e-4
    """Peak learning rate of the gates."""
    offset_lr: float = 1e-2
    """Peak learning rate of the offsets, which have their own group."""
    weight_decay: float = 0.0
    """AdamW decay of the gates, never of the offsets."""
    warmup_steps: int = 100
    """Linear warm-up."""
    schedule: str = "cosine"
    """linear or cosine, to 0 at max_steps; tied to steps, never to wall clock."""
    clip: float = 1.0
    """Gradient norm clip."""
    strategy: str = "auto"
    """auto, ddp, fsdp or deepspeed: Lightning's; the frozen base is held whole by every process."""
    devices: int = 1
    """Processes on each node; with several, data.batch_size is that of each."""
    num_nodes: int = 1
    """Nodes of a cluster."""
    recompute_activations: bool = False
    """Hold only each layer's input and run it again in the backward: a third more time, memory for long contexts."""
    val_every: int = 200
    """Steps between validations under hard eviction."""
    save_every: int = 50
    """Steps between checkpoints that a killed run resumes from."""
    val_budgets: list[str] = field(default_factory=lambda: ["5%", "2.5%", "1.25%"])
    """Budgets of the validation; its mean accuracy chooses the exported gates."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "val_every", "save_every", "devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected trainer.{name} of at least 1, got {getattr(self, name)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"expected trainer.strategy among {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if not self.lr > 0 or not self.offset_lr > 0:
            raise ValueError(f"expected learning rates above 0, got lr {self.lr} and offset_lr {self.offset_lr}")
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"expected trainer.schedule linear or cosine, got {self.schedule!r}")


@dataclass
class MemoryTraining:
    """How a memory of evicted tokens is trained on frozen gates, where `memory` is not none."""

    gates: str | None = None
    """Artefact of the gates; null is the newest run's, outputs/latest/gates."""
    kept: str = "0.5%-30%"
    """Range of the kept share that every step draws from, log-uniformly."""
    policies: list[str] = field(default_factory=lambda: ["db_trim_kv", "trim_kv", "random"])
    """Policies whose evictions it sees, drawn at every step."""
    regression_share: float = 0.3
    """Part of the steps that regress attention outputs; the rest distils the model's answers under hard eviction."""

    def __post_init__(self) -> None:
        parts = [Budget.parse(x) for x in self.kept.split("-")]
        if len(parts) != 2 or any(x.unit != "fraction" for x in parts) or parts[0].amount > parts[1].amount:
            raise ValueError(f"expected memory_training.kept like 0.5%-30%, got {self.kept!r}")
        wrong = [name for name in self.policies if name not in POLICIES or not POLICIES[name].evicts]
        if wrong or not self.policies:
            raise ValueError(f"expected memory_training.policies that evict, got {wrong or 'none'}")
        if not 0 <= self.regression_share <= 1:
            raise ValueError(f"expected memory_training.regression_share in [0, 1], got {self.regression_share}")


@dataclass
class TrainConfig:
    """A training run: frozen model, gates, objective, data, trainer, logger."""

    model: ModelConfig = field(default_factory=ModelConfig)
    gate: GateConfig = field(default_factory=DBTrim)
    objective: Objective = field(default_factory=Distillation)
    task: Task = field(default_factory=lambda: Needles(n_needles=40, asked_colour="red", n_asked=12))
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    memory: MemoryConfig = field(default_factory=NoMemory)
    memory_training: MemoryTraining = field(default_factory=MemoryTraining)
    logger: str = "wandb"
    """wandb (offline unless logged in, CSV beside it) or csv."""
    seed: int = 0
    """Seed of the gates' initial weights and of each step's draws."""
    output_dir: str = "outputs/train/run"
    """Where the run writes."""
    resume: str | None = None
    """Folder of a run to go on with, the other values being the same; auto is output_dir where it holds a run already,
    so that one command starts and continues (a job that is put back into its queue)."""
    experiment: str | None = None
    """Name of the experiment preset, for the record."""

    def __post_init__(self) -> None:
        if self.objective.gate not in (None, self.gate.name):
            raise ValueError(
                f"objective {self.objective.name} trains gate={self.objective.gate} only, got gate={self.gate.name}"
            )
        if self.gate.budget_conditioned and type(self.objective).draw_budget is Objective.draw_budget:
            raise ValueError(
                f"gate.budget_conditioned needs an objective that draws budgets, got {self.objective.name}; use "
                "objective=distillation, or leave it out"
            )
        if self.logger not in LOGGERS:
            raise ValueError(f"expected logger among {', '.join(LOGGERS)}, got {self.logger!r}")
