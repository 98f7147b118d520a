"""The registry of tasks; named presets are the files of `configs/task/`."""

from retention.tasks.base import Task
from retention.tasks.benchmarks import BENCHMARKS
from retention.tasks.count_list import CountList
from retention.tasks.deferred_region import DeferredRegion
from retention.tasks.diffuse_count import DiffuseCount
from retention.tasks.dilution import Dilution
from retention.tasks.doc_pages import DocPages
from retention.tasks.haystack_any_all import HaystackAnyAll
from retention.tasks.jigsaw import Jigsaw
from retention.tasks.long_trace import LongTrace
from retention.tasks.majority import Majority
from retention.tasks.multi_query import MultiQuery
from retention.tasks.needle import Needle
from retention.tasks.needles import Needles
from retention.tasks.recall import Recall
from retention.tasks.ruler.task import Ruler
from retention.tasks.state_change import StateChange
from retention.tasks.stream_video import StreamVideo
from retention.tasks.text_heavy import TextHeavy
from retention.tasks.three_statements import ThreeStatements
from retention.tasks.tile_index import TileIndex
from retention.tasks.tpr_stress import TprStress

TASKS: dict[str, type[Task]] = {
    "needles": Needles,
    "recall": Recall,
    "text_heavy": TextHeavy,
    "majority": Majority,
    "diffuse_count": DiffuseCount,
    "needle": Needle,
    "deferred_region": DeferredRegion,
    "multi_query": MultiQuery,
    "count_list": CountList,
    "three_statements": ThreeStatements,
    "jigsaw": Jigsaw,
    "state_change": StateChange,
    "doc_pages": DocPages,
    "tile_index": TileIndex,
    "haystack_any_all": HaystackAnyAll,
    "dilution": Dilution,
    "tpr_stress": TprStress,
    "stream_video": StreamVideo,
    "long_trace": LongTrace,
    "ruler": Ruler,
    **BENCHMARKS,
}

__all__ = ["TASKS", "Task"]
