"""The registry of tasks; named presets are the files of `configs/task/`."""

from retention.tasks.base import Task
from retention.tasks.diffuse_count import DiffuseCount
from retention.tasks.majority import Majority
from retention.tasks.needles import Needles
from retention.tasks.recall import Recall
from retention.tasks.text_heavy import TextHeavy

TASKS: dict[str, type[Task]] = {
    "needles": Needles,
    "recall": Recall,
    "text_heavy": TextHeavy,
    "majority": Majority,
    "diffuse_count": DiffuseCount,
}

__all__ = ["TASKS", "Task"]
