"""The registry of eviction policies, by the names that configs and tables use."""

from retention.policies.adakv import AdaKV
from retention.policies.base import Policy
from retention.policies.cake import Cake
from retention.policies.criticalkv import CriticalKV
from retention.policies.db_trim_kv import DBTrimKV
from retention.policies.dms import DMS
from retention.policies.duo_attention import DuoAttention
from retention.policies.expected_attention import ExpectedAttention
from retention.policies.fastkvzip import FastKVzip
from retention.policies.full import Full
from retention.policies.h2o import H2O
from retention.policies.infinipot_v import InfiniPotV
from retention.policies.keydiff import KeyDiff
from retention.policies.knorm import Knorm
from retention.policies.kvzap import KVzap
from retention.policies.kvzip import KVzip
from retention.policies.lagkv import LagKV
from retention.policies.locret import Locret
from retention.policies.look_m import LookM
from retention.policies.mada import Mada
from retention.policies.meda import Meda
from retention.policies.mixkv import MixKV
from retention.policies.oracle import AttentionOracle, Oracle
from retention.policies.prefixkv import PrefixKV
from retention.policies.pyramidkv import PyramidKV
from retention.policies.quota import Quota
from retention.policies.r_kv import RKV
from retention.policies.random import Random
from retention.policies.retentive import Retentive
from retention.policies.snapkv import SnapKV
from retention.policies.streaming_llm import StreamingLLM
from retention.policies.tgv_kv import TGVKV
from retention.policies.tova import TOVA
from retention.policies.trim_kv import TrimKV
from retention.policies.vl_cache import VLCache
from retention.policies.wrapper import KNOWN

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "random": Random,
    "streaming_llm": StreamingLLM,
    "knorm": Knorm,
    "keydiff": KeyDiff,
    "snapkv": SnapKV,
    "h2o": H2O,
    "tova": TOVA,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "look_m": LookM,
    "tgv_kv": TGVKV,
    "oracle": Oracle,
    "attention_oracle": AttentionOracle,
    "kvzip": KVzip,
    "mada": Mada,
    "cake": Cake,
    "criticalkv": CriticalKV,
    "mixkv": MixKV,
    "prefixkv": PrefixKV,
    "vl_cache": VLCache,
    "retentive": Retentive,
    "meda": Meda,
    "r_kv": RKV,
    "lagkv": LagKV,
    "infinipot_v": InfiniPotV,
    "expected_attention": ExpectedAttention,
    "trim_kv": TrimKV,
    "db_trim_kv": DBTrimKV,
    "kvzap": KVzap,
    "fastkvzip": FastKVzip,
    "locret": Locret,
    "duo_attention": DuoAttention,
    "dms": DMS,
    "quota": Quota,
}
KNOWN.update(POLICIES)


def policy_of(objective: str) -> str:
    """Name of the policy that ranks by gates of an objective; the first, where allocators tell several apart."""
    return next(name for name, policy in POLICIES.items() if policy.gates_of == objective)


__all__ = ["POLICIES", "Policy", "policy_of"]
