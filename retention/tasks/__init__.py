"""The registry of tasks; named presets are the files of `configs/task/`."""

from retention.tasks.base import Task
from retention.tasks.needles import Needles

TASKS: dict[str, type[Task]] = {"needles": Needles}

__all__ = ["TASKS", "Task"]
