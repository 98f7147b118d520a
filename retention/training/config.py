"""Everything a training run is told; defaults follow the published recipes, `configs/` holds the demo's."""

from dataclasses import dataclass, field

from retention.budget import Budget
from retention.data.encode import LOSSES, VIDEOS
from retention.data.source import SourceConfig
from retention.gates import GateConfig
from retention.gates.dbtrim import DBTrim
from retention.memory import MemoryConfig, NoMemory
from retention.models.load import ModelConfig
from retention.objectives import Objective
from retention.objectives.distillation import Distillation
from retention.policies import POLICIES
from retention.tasks import Task
from retention.tasks.needles import Needles
from retention.types import require

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
    sources: list[SourceConfig] = field(default_factory=list)
    """Data sets to train on instead of the task, which then only validates; none trains on the task."""
    loss_on: str = "answers"
    """What of a source's rows is learned: answers (of the assistant) or all (every token of text)."""
    max_length: int | None = None
    """Most tokens of a row; longer ones are bad rows."""
    truncate: bool = False
    """Whether text beyond max_length is cut off instead."""
    max_tokens: int | None = None
    """Most tokens of a batch: its rows times the longest, padding among them; with packing the tokens that rows have."""
    packing: bool = False
    """Whether the decoder gets a batch's rows as documents of one, without padding, isolated from each other."""
    max_images: int | None = None
    """Most images of a batch, and of a row."""
    video_frames: int = 8
    """Most frames of a video."""
    videos: str = "frames"
    """frames (a video is read as images, by any model) or native (as the model's processor reads videos)."""
    video_fps: float = 1.0
    """Frames per second of videos that do not say it (folders and lists of frames)."""
    image_tokens: int = 256
    """What an image is guessed to take when rows of like length are put together; budgets hold whatever it takes."""
    bucket: int = 16
    """Among how many batches rows of like length are put together; 1 keeps them as drawn."""
    on_bad: str = "skip"
    """skip bad rows (missing image, empty text, too long), counted and logged, or refuse them and stop."""
    held_out: float = 0.0
    """Share of each source's rows that is kept from training and validates in place of the task; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "val_examples", "max_length", "max_tokens", "max_images", "video_frames", "bucket"):
            value = getattr(self, name)
            require([(value is None or value >= 1, f"data.{name} of at least 1", value)])
        streamed = any(source.streaming for source in self.sources)
        require(
            [
                (self.loss_on in LOSSES, f"data.loss_on {' or '.join(LOSSES)}", self.loss_on),
                (self.videos in VIDEOS, f"data.videos {' or '.join(VIDEOS)}", self.videos),
                (self.video_fps > 0, "data.video_fps above 0", self.video_fps),
                (self.on_bad in ("skip", "refuse"), "data.on_bad skip or refuse", self.on_bad),
                (0 <= self.held_out < 1, "data.held_out of at least 0 and below 1", self.held_out),
                (
                    not self.held_out or (bool(self.sources) and not streamed),
                    "data.held_out with data.sources, none of them streaming",
                    self.held_out,
                ),
                (
                    len({source.weight is None for source in self.sources}) < 2,
                    "a weight in every one of data.sources or in none",
                    [source.weight for source in self.sources],
                ),
            ]
        )


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
    accumulate: int = 1
    """Batches of data.batch_size to a step, one after the other: the step of one batch as large, in the memory of one."""
    strategy: str = "auto"
    """auto, ddp (Lightning's: every process holds the frozen base whole), fsdp (ddp for the gates, the base's layers
    shared out over the processes) or deepspeed (Lightning's, where it is installed)."""
    devices: int = 1
    """Processes on each node; with several, data.batch_size is that of each."""
    num_nodes: int = 1
    """Nodes of a cluster."""
    lora_rank: int = 0
    """Rank of LoRA layers that the student gets beside the gates (needs peft); 0 for none."""
    lora_alpha: float = 16.0
    """What the student's LoRA adds is scaled by this over its rank."""
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Linear layers of the decoder, by the ends of their names, that get LoRA."""
    lora_lr: float = 1e-4
    """Peak learning rate of LoRA, which has its own group."""
    recompute_activations: bool = False
    """Hold only each layer's input and run it again in the backward: a third more time, memory for long contexts."""
    val_every: int = 200
    """Steps between validations under hard eviction."""
    save_every: int = 50
    """Steps between checkpoints that a killed run resumes from."""
    picture_every: int | None = None
    """Steps between pictures of what held-out contexts would keep, in the run's folder pictures; null for none."""
    val_budgets: list[str] = field(default_factory=lambda: ["5%", "2.5%", "1.25%"])
    """Budgets of the validation; its mean accuracy chooses the exported gates."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "val_every", "save_every", "devices", "num_nodes", "accumulate", "picture_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"expected trainer.{name} of at least 1, got {getattr(self, name)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"expected trainer.strategy among {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if not self.lr > 0 or not self.offset_lr > 0:
            raise ValueError(f"expected learning rates above 0, got lr {self.lr} and offset_lr {self.offset_lr}")
        if self.lora_rank < 0 or not self.lora_alpha > 0 or not self.lora_lr > 0 or not self.lora_targets:
            raise ValueError(
                "expected trainer.lora_rank of 0 or more, lora_alpha and lora_lr above 0 and some lora_targets, got "
                f"{self.lora_rank}, {self.lora_alpha}, {self.lora_lr} and {self.lora_targets}"
            )
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
    init_gates: str | None = None
    """Artefact of trained gates to go on from, of the architecture that `gate` says; null for new ones."""
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
        if self.trainer.lora_rank and not self.objective.teacher:
            raise ValueError(
                f"trainer.lora_rank needs an objective that compares with the full cache, got {self.objective.name}; use "
                "objective=distillation, or leave it out"
            )
        if self.memory.name != "none" and (self.trainer.lora_rank or self.init_gates):
            raise ValueError(
                "a memory is trained on frozen gates alone, got trainer.lora_rank or init_gates beside it; leave them out "
                "(its gates are memory_training.gates)"
            )
        if self.memory.name != "none" and (self.trainer.accumulate > 1 or self.trainer.strategy == "fsdp"):
            raise ValueError(
                "a memory is trained on one batch per step and a base that is held whole, got trainer.accumulate="
                f"{self.trainer.accumulate} and trainer.strategy={self.trainer.strategy}; leave them out"
            )
        if self.trainer.strategy == "fsdp" and (self.model.quantization != "none" or self.model.device_map is not None):
            raise ValueError(
                "trainer.strategy=fsdp shares out whole weights, got model.quantization="
                f"{self.model.quantization} and model.device_map={self.model.device_map}; leave them out, or use "
                "trainer.strategy=ddp"
            )
        if self.memory.name != "none" and self.data.packing:
            raise ValueError("expected data.packing=false where a memory is trained, got true; leave it out")
        if self.logger not in LOGGERS:
            raise ValueError(f"expected logger among {', '.join(LOGGERS)}, got {self.logger!r}")
