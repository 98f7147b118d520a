"""Several processes on one evaluation (`torchrun`): each takes every n-th batch, the first one gathers and reports."""

import os
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch

from retention.models.load import ModelConfig

T = TypeVar("T")


def rank() -> int:
    """Number of this process among those of the run."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def agreed(value: T) -> T:
    """The first process's value, in every process; waits for all of them."""
    if world_size() == 1:
        return value
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # a batch may take any time
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def wait() -> None:
    """Go on when every process is here."""
    agreed(None)
    if world_size() > 1:
        torch.distributed.barrier()


def own_device(config: ModelConfig) -> ModelConfig:
    """The model on a GPU of this process's own, where there are several and none is named."""
    if world_size() == 1 or config.device != "auto" or not torch.cuda.is_available():
        return config
    return replace(config, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
