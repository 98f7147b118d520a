"""What is observed during a forward: attention rows and column sums recomputed from queries and keys.

A collector sees one layer's post-RoPE queries and all its cached keys and returns statistics aligned with
the keys. `accumulates` says whether a statistic of earlier forwards is added to (column sums) or replaced.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from retention.ops.observe import column_sums, window_rows

WINDOW = 64
"""Rows kept for window policies: the most any of them asks for."""


@dataclass
class Observation:
    """One layer's attention call: queries of this forward, all keys, who may see whom."""

    queries: Float[Tensor, "batch heads queries head_dim"]
    keys: Float[Tensor, "batch kv_heads keys head_dim"]
    visible: Bool[Tensor, "batch kv_heads queries keys"]
    scaling: float
    window: int = WINDOW
    """Rows that window policies read; no more are kept."""


@dataclass
class Collector:
    """A named observation, and whether it adds up over forwards."""

    observe: Callable[[Observation], Mapping[str, Tensor]]
    accumulates: bool = False


def _window_rows(call: Observation) -> dict[str, Tensor]:
    return {"window_rows": window_rows(call.queries, call.keys, call.visible, call.scaling, call.window)}


def _column_sums(call: Observation) -> dict[str, Tensor]:
    return {"column_sums": column_sums(call.queries, call.keys, call.visible, call.scaling)}


COLLECTORS: dict[str, Collector | None] = {
    "none": None,
    "keys_values": None,
    "gate": None,
    "window_rows": Collector(_window_rows),
    "column_sums": Collector(_column_sums, accumulates=True),
}
