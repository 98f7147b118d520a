"""The registry of eviction policies, by the names that configs and tables use."""

from retention.policies.base import Policy
from retention.policies.db_trim_kv import DBTrimKV
from retention.policies.full import Full
from retention.policies.h2o import H2O
from retention.policies.keydiff import KeyDiff
from retention.policies.knorm import Knorm
from retention.policies.random import Random
from retention.policies.snapkv import SnapKV
from retention.policies.streaming_llm import StreamingLLM
from retention.policies.trim_kv import TrimKV

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "random": Random,
    "streaming_llm": StreamingLLM,
    "knorm": Knorm,
    "keydiff": KeyDiff,
    "snapkv": SnapKV,
    "h2o": H2O,
    "trim_kv": TrimKV,
    "db_trim_kv": DBTrimKV,
}

__all__ = ["POLICIES", "Policy"]
