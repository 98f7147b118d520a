"""The registry of training objectives."""

from retention.objectives.base import Objective
from retention.objectives.distillation import Distillation
from retention.objectives.dms import DMS
from retention.objectives.duo_attention import DuoAttention
from retention.objectives.fastkvzip import FastKVzip
from retention.objectives.hard_eviction import HardEviction
from retention.objectives.kvzap import KVzap
from retention.objectives.locret import Locret

OBJECTIVES: dict[str, type[Objective]] = {
    "distillation": Distillation,
    "hard_eviction": HardEviction,
    "kvzap": KVzap,
    "fastkvzip": FastKVzip,
    "locret": Locret,
    "duo_attention": DuoAttention,
    "dms": DMS,
}

__all__ = ["OBJECTIVES", "Objective"]
