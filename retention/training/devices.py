"""Where a run computes: in one process or many, and how a step in parts is that of one batch in one process."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from retention.types import LossTerms

if TYPE_CHECKING:
    from retention.training.config import TrainConfig

FOLDER = "RETENTION_OUTPUT_DIR"
"""Hands the run's folder to the processes that a strategy starts, whose own clock would name another."""


def rank() -> int:
    """Number of this process among those of the run, 0 for the one that writes."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def world_size() -> int:
    """Processes of the run."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


def settle(config: "TrainConfig") -> "TrainConfig":
    """The config as this process runs it: a run that is there already, the first process's folder, a GPU of its own."""
    if config.resume == "auto":
        started = (Path(config.output_dir) / "config.json").exists()
        config = replace(config, resume=config.output_dir if started else None)
    folder = config.resume or config.output_dir
    if rank() == 0:
        os.environ[FOLDER] = folder
    elif FOLDER in os.environ:
        own = os.environ[FOLDER]
        config = replace(config, resume=own) if config.resume else replace(config, output_dir=own)
    several = config.trainer.devices > 1 or config.trainer.num_nodes > 1
    if several and config.model.device == "auto" and torch.cuda.is_available():
        own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        start = "cpu" if config.trainer.strategy == "fsdp" else own_gpu  # sharding moves one layer at a time
        config = replace(config, model=replace(config.model, device=start))
    return config


def strategy(name: str) -> str:
    """Lightning's name of a strategy: gates are replicated where the base is shared out.

    Raises:
        ValueError: for one whose package is missing.
    """
    if name == "deepspeed" and find_spec("deepspeed") is None:
        raise ValueError(
            "trainer.strategy=deepspeed needs the package deepspeed; install it with pip install deepspeed, or use "
            "trainer.strategy=fsdp"
        )
    return "ddp" if name == "fsdp" else name


def across_ranks(terms: LossTerms, counts: Mapping[str, float] | None = None, batches: int = 1) -> LossTerms:
    """Terms whose gradients, averaged over processes and a step's batches, are those of one batch with all rows.

    Totals are sums over rows and counts are known without gradients, so each part divides its own total by the mean
    count of all. `counts` are those of this process's `batches`, known ahead; by default of its only one.
    """
    parts = world_size() * batches
    if parts == 1:
        return terms
    names = sorted(terms.terms)
    own = {name: terms.terms[name][1].detach() for name in names} if counts is None else counts
    device = terms.terms[names[0]][0].device
    whole = torch.stack([torch.as_tensor(own[name], dtype=torch.float64, device=device) for name in names])
    if world_size() > 1:
        torch.distributed.all_reduce(whole)
    whole = whole / parts
    shared = {name: (terms.terms[name][0], whole[i].float()) for i, name in enumerate(names)}
    return LossTerms(shared, terms.weights, least=1 / parts)


def of_all_ranks(own: Mapping[str, int]) -> Counter[str]:
    """Sums over all processes, which must all ask."""
    every: list[Any] = [own]
    if world_size() > 1:
        every = [None] * world_size()
        torch.distributed.all_gather_object(every, dict(own))
    return sum((Counter(found) for found in every), start=Counter())
