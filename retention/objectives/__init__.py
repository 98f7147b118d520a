"""The registry of training objectives."""

from retention.objectives.base import Objective
from retention.objectives.distillation import Distillation

OBJECTIVES: dict[str, type[Objective]] = {"distillation": Distillation}

__all__ = ["OBJECTIVES", "Objective"]
