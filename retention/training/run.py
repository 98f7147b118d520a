"""A whole training run: frozen model, gates, Lightning, the exported artefact."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

from retention.data.render import Rendered, Renderer
from retention.gates import RetentionGates
from retention.memory import RetentionMemory
from retention.models import family_of
from retention.models.family import decoder_device
from retention.models.load import load_configured
from retention.training.callbacks import HalfLives, HardEvictionValidation, RandomState
from retention.training.config import TrainConfig
from retention.training.cost import Cost
from retention.training.datamodule import GateData
from retention.training.devices import rank, settle, strategy
from retention.training.export import chosen_record
from retention.training.gap import EXAMPLES, gap_of, target
from retention.training.initial import trained_gates
from retention.training.loggers import Tracking
from retention.training.memory import MemoryTrainer
from retention.training.module import GateTrainer
from retention.training.pictures import Pictures, survival_of
from retention.training.resume import claim, newest_checkpoint, settings
from retention.training.student import Student, adapter_record
from retention.training.validation import hard_eviction_accuracy
from retention.training.watch import Finite, Preemption, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def run(config: TrainConfig) -> Path:
    """Train gates as configured and export the best; returns the artefact's folder.

    Killed at any moment, the same config with `resume` set to the run's folder ends with bitwise the same gates on the
    same machine.
    """
    config = settle(config)
    folder = Path(config.resume or config.output_dir)
    if rank() == 0:
        claim(folder, config)
    artefact = folder / "gates"
    if artefact.exists():
        log.info("%s is finished, its gates are in %s", folder, artefact)
        return artefact
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    checkpoint, start = newest_checkpoint(folder)
    torch.manual_seed(config.seed)
    model, processor = load_configured(config.model)
    gates = _with_memory(config, model) if config.memory.name != "none" else _fresh(config, model)
    if config.memory.name != "none" and not config.memory.trained:
        gates.save_pretrained(artefact)
        _point_latest(folder)
        return artefact
    renderer = Renderer(processor, family_of(model).visual_ids(model.config))
    module: GateTrainer | MemoryTrainer
    if gates.memory is None:
        student = Student(model, config.trainer, seed=config.seed) if config.trainer.lora_rank else None
        own: dict[str, Any] = {"seed": config.seed, "packing": config.data.packing, "student": student}
        module = GateTrainer(model, gates, config.objective, config.trainer, **own)
    else:
        module = MemoryTrainer(model, gates, config.memory_training, config.trainer, seed=config.seed)
    steps, parts = config.trainer.max_steps, config.trainer.accumulate
    data = GateData(config.task, renderer, config.data, config.model.prompt_style, steps, parts)
    tracking = Tracking(config.logger, folder, _name(config), settings(config), start)
    contexts = data.validation_contexts()
    best = HardEvictionValidation(
        lambda: hard_eviction_accuracy(model, gates, contexts, config.trainer.val_budgets, renderer),
        config.trainer.val_every,
        steps,
        gap_of(module, contexts, renderer),
    )
    cost = Cost()
    seen: list[L.Callback] = [best, cost]
    if config.trainer.picture_every is not None:
        few = renderer.render(contexts.examples[:EXAMPLES])
        seen.append(_pictures(config, model, gates, few, folder, tracking))
    trainer = _trainer(config, folder, tracking, seen)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            ".*(does not have many workers|isinstance\\(treespec, LeafSpec\\)|val_dataloader|number of training batches).*",
        )
        trainer.fit(
            module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True
        )
    if rank() > 0:
        return artefact
    if isinstance(module, GateTrainer) and module.student is not None:
        module.student.load_state_dict(best.best_student)
        module.student.export(folder / "adapter")
    gates.load_state_dict(best.best)
    gates.training_record |= chosen_record(best.state_dict()) | data.record(cost.bad) | {"cost": cost.final}
    gates.save_pretrained(artefact)
    tracking.finish(best.best_rows, artefact)
    _point_latest(folder)
    return artefact


def _fresh(config: TrainConfig, model: "PreTrainedModel") -> RetentionGates:
    """New gates for the model, or trained ones to go on from."""
    if config.init_gates is not None:
        return trained_gates(config, model, _record(config))
    if config.objective.goes_on:
        log.warning("objective=%s is meant for trained gates; name some with init_gates", config.objective.name)
    gates = RetentionGates.for_model(config.gate, model, config.model.revision)
    gates.training_record = _record(config)
    if config.objective.initial_score is not None:
        gates.start_at(config.objective.initial_score)
    return gates


def _with_memory(config: TrainConfig, model: "PreTrainedModel") -> RetentionGates:
    """Trained gates, frozen, with a new memory beside them."""
    gates = RetentionGates.from_pretrained(config.memory_training.gates or "outputs/latest/gates")
    gates.check(model)
    gates.requires_grad_(False)
    gates.memory = RetentionMemory(config.memory, gates.shape)
    gates.training_record["memory"] = {
        **asdict(config.memory_training),
        "steps": config.trainer.max_steps,
        "seed": config.seed,
    }
    return gates.to(decoder_device(model)).train()


def _name(config: TrainConfig) -> str:
    if config.memory.name != "none":
        return f"memory-{config.memory.name}-{config.task.name}-seed{config.seed}"
    return f"{config.objective.name}-{config.gate.name}-{config.task.name}-seed{config.seed}"


def _pictures(
    config: TrainConfig,
    model: "PreTrainedModel",
    gates: RetentionGates,
    few: Rendered,
    folder: Path,
    tracking: Tracking,
) -> Pictures:
    """Pictures of what the gates would keep of a few contexts, at the budget they are trained for."""
    assert config.trainer.picture_every is not None
    policy, budget = target(config.objective, config.trainer.val_budgets[0])
    measure = partial(survival_of, model, gates, policy, budget, few)
    title = f"{type(policy).__name__} at {budget}"
    return Pictures(measure, config.trainer.picture_every, folder / "pictures", tracking.picture, title)


def _trainer(config: TrainConfig, folder: Path, tracking: Tracking, own: Sequence[L.Callback]) -> L.Trainer:
    """Lightning's trainer with the run's callbacks; checkpoints hold gates, optimiser and counters only."""
    saver = ModelCheckpoint(
        folder / "checkpoints", filename="{step}", every_n_train_steps=config.trainer.save_every, save_top_k=1
    )
    lives = [HalfLives(config.trainer.val_every, tracking.histogram)] if config.objective.score_kind == "decay" else []
    return L.Trainer(
        max_steps=config.trainer.max_steps,
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy(config.trainer.strategy),
        use_distributed_sampler=False,
        gradient_clip_val=config.trainer.clip,
        logger=tracking.loggers,
        log_every_n_steps=min(10, config.trainer.max_steps),
        num_sanity_val_steps=0,
        callbacks=[
            *own,
            *lives,
            Watch(),
            Finite(folder),
            Preemption(folder),
            RandomState(),
            TQDMProgressBar(refresh_rate=10),
            saver,
        ],
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _record(config: TrainConfig) -> dict[str, Any]:
    """What the artefact says of its training."""
    return {
        **config.objective.describe(),
        "task": config.task.name,
        "task_settings": asdict(config.task),
        "seed": config.seed,
        "data_seed": config.data.seed,
        "steps": config.trainer.max_steps,
        "protected": {"sink_size": 0, "recent_size": 0},
        **({} if config.trainer.lora_rank == 0 else {"adapter": adapter_record(config.trainer)}),
    }


def _point_latest(folder: Path) -> None:
    """`outputs/latest` follows the newest finished run that lies below `outputs/`."""
    root = Path("outputs").resolve()
    if root in folder.resolve().parents:
        fresh = root / f".latest.{os.getpid()}"
        fresh.symlink_to(os.path.relpath(folder.resolve(), root))
        os.replace(fresh, root / "latest")
