"""Where a run computes: in one process or many, and how the loss of many is that of one."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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
        number = os.environ.get("LOCAL_RANK", "0")
        config = replace(config, model=replace(config.model, device=f"cuda:{number}"))
    return config


def across_ranks(terms: LossTerms) -> LossTerms:
    """Terms whose gradients, averaged over all processes, are those of one process with all rows.

    Totals are sums over rows and counts are known without gradients, so each process divides its own total by the
    mean count of all.
    """
    if world_size() == 1:
        return terms
    names = sorted(terms.terms)
    counts = torch.stack([terms.terms[name][1].detach().double() for name in names])
    torch.distributed.all_reduce(counts)
    counts = counts / world_size()
    shared = {name: (terms.terms[name][0], counts[i].float()) for i, name in enumerate(names)}
    return LossTerms(shared, terms.weights, least=1 / world_size())
