"""What is observed during a forward: attention rows and column sums recomputed from queries and keys.

A collector sees one layer's post-RoPE queries and all its cached keys and returns statistics aligned with
the keys. `accumulates` says whether a statistic of earlier forwards is added to (column sums) or replaced.

The collectors `second_pass` and `answer_pass` see nothing of the prompt's own forward: more is fed behind the prompt
right before a decision (`Repetition`, `Foresight`), entries keep what they got there, and what was fed is forgotten.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.entropy import OBSERVED, OBSERVED_HEADS, observer_rows, observing_queries
from retention.ops.observe import (
    attention_rows,
    column_sums,
    expected_logits,
    modality_entropy,
    peak_rows,
    text_attention,
    text_density,
    text_queries,
    window_rows,
)
from retention.ops.output_norms import l1_output_norms
from retention.ops.rope import mean_turn, turn_keys
from retention.ops.scores import row_moments

WINDOW = 64
"""Rows kept for window policies: the most any of them asks for."""
FALLBACK = 32
"""Newest queries that stand in for text rows where no text follows the vision."""
TEXT_STATISTICS = ("text_sums", "text_relevance", "text_counts")
"""Attention received from text rows, the same weighted by how much text heeds the row, and the rows behind each key."""

MOMENT_ROWS = 32
"""Newest queries whose attention is summed up by its mean, variance and entropy."""
MOMENTS = ("row_mean", "row_variance", "row_entropy")
SKIPPED, AHEAD = 4, 512
"""First queries left out of the moments of queries, and how many positions to come they are turned to."""
EXPECTED = ("expected_mean", "expected_spread")
LEAST = 0.01
"""Part of a row's largest weight below which attention counts as none."""
DENSITY = ("text_dense", "text_seen")


REPEATED, FORESEEN = "second_pass", "answer_pass"


@dataclass(frozen=True)
class Repetition:
    """All that came since the last eviction is fed once more, in chunks, each measured against its own entries."""

    chunk: int
    """Tokens repeated at a time."""
    overlap: int
    """Last tokens of a chunk that open the next one."""
    sinks: int
    """First tokens that take part in every chunk's softmax."""
    words: tuple[str, str]
    """What asks for the first chunk, and for a later one; empty, or for want of a tokenizer, nothing does."""
    weighed: bool = False
    """Times `||W_O v||` of the entry, by the norm of the query's attention input."""

    statistic = REPEATED


@dataclass(frozen=True)
class Foresight:
    """The questions to come are fed with their answers, and measured against everything held."""

    questions: bool = False
    """Also queries of the questions count, not only those that an answer is read off."""
    mean: bool = False
    """The mean over queries and the query group instead of the largest."""

    statistic = FORESEEN


@dataclass
class Rotary:
    """Where the queries of a forward were rotated to, and where the next tokens will be."""

    angles: Float[Tensor, "batch queries frequencies"]
    frequencies: Float[Tensor, " frequencies"]
    positions: Int[Tensor, "batch queries"]
    """Sequence index of each query, padding excluded."""
    upcoming: Int[Tensor, " batch"]
    """Coordinate of the next token, which is taken to be text."""


@dataclass
class Observation:
    """One layer's attention call: queries of this forward, all keys, who may see whom."""

    queries: Float[Tensor, "batch heads queries head_dim"]
    keys: Float[Tensor, "batch kv_heads keys head_dim"]
    visible: Bool[Tensor, "batch kv_heads queries keys"]
    scaling: float
    window: int = WINDOW
    """Rows that window policies read; no more are kept."""
    valid: Bool[Tensor, "batch queries"] | None = None
    """False where a query is padding; filled in by the layer, as the next two."""
    visual: Bool[Tensor, "batch queries"] | None = None
    """Queries of visual tokens."""
    seen_visual: Bool[Tensor, " batch"] | None = None
    """Whether visual tokens came before this forward, held or evicted."""
    visual_keys: Callable[[], Bool[Tensor, "batch kv_heads keys"]] | None = None
    """Which keys are visual, for who asks."""
    values: Float[Tensor, "batch kv_heads keys value_dim"] | None = None
    output: Float[Tensor, "hidden features"] | None = None
    """Weight of the projection behind attention; its features are those of all query heads in order."""
    rotary: Rotary | None = None
    """Given where a collector in force reads queries before their rotation."""


@dataclass
class Collector:
    """An observation of some named statistics, and whether they add up over forwards."""

    observe: Callable[[Observation], Mapping[str, Tensor]]
    names: tuple[str, ...]
    accumulates: bool = False
    newest: bool = False
    """Only the newest rows of a forward are read, `Observation.window` of them or MOMENT_ROWS."""
    rolls: bool = False
    """The newest rows of the window: a prompt's, whatever its chunks, then beside them those of decoded tokens."""


def _window_rows(call: Observation) -> dict[str, Tensor]:
    return {"window_rows": window_rows(call.queries, call.keys, call.visible, call.scaling, call.window)}


def _column_sums(call: Observation) -> dict[str, Tensor]:
    return {"column_sums": column_sums(call.queries, call.keys, call.visible, call.scaling)}


def _text_rows(call: Observation) -> dict[str, Tensor]:
    assert call.valid is not None
    assert call.visual is not None
    assert call.seen_visual is not None
    rows = text_queries(call.valid, call.visual, call.seen_visual, FALLBACK)
    found = text_attention(call.queries, call.keys, call.visible, call.scaling, rows, call.visual)
    return dict(zip(TEXT_STATISTICS, found, strict=True))


def _window_peaks(call: Observation) -> dict[str, Tensor]:
    return {"window_peaks": peak_rows(call.queries, call.keys, call.visible, call.scaling, call.window)}


def _window_moments(call: Observation) -> dict[str, Tensor]:
    seen = call.visible[:, :, -MOMENT_ROWS:]
    rows = attention_rows(call.queries[:, :, -MOMENT_ROWS:], call.keys, seen, call.scaling)
    return dict(zip(MOMENTS, row_moments(rows), strict=True))


def _output_norm(call: Observation) -> dict[str, Tensor]:
    if call.values is None or call.output is None or not call.output.is_floating_point():
        raise ValueError("norms behind the output projection need an attention module with a plain o_proj weight")
    return {"output_norm": l1_output_norms(call.values, call.output)}


def _query_moments(call: Observation) -> dict[str, Tensor]:
    assert call.rotary is not None
    assert call.valid is not None
    there = call.rotary
    back = -there.angles[:, None].expand(-1, call.queries.shape[1], -1, -1)
    plain = turn_keys(call.queries.float(), back)
    later = call.valid & (there.positions >= SKIPPED)
    real = torch.where(later.any(1, keepdim=True), later, call.valid)
    turn = mean_turn(there.upcoming, AHEAD, there.frequencies, call.queries.shape[-1])
    found = expected_logits(plain, call.keys, real, turn, call.scaling)
    return dict(zip(EXPECTED, found, strict=True))


def _text_density(call: Observation) -> dict[str, Tensor]:
    assert call.valid is not None
    assert call.visual is not None
    assert call.seen_visual is not None
    rows = text_queries(call.valid, call.visual, call.seen_visual, FALLBACK)
    found = text_density(call.queries, call.keys, call.visible, call.scaling, rows, LEAST)
    return dict(zip(DENSITY, found, strict=True))


def _modality_entropy(call: Observation) -> dict[str, Tensor]:
    assert call.visual is not None
    assert call.visual_keys is not None
    found = modality_entropy(call.queries, call.keys, call.visible, call.scaling, call.visual, call.visual_keys())
    return {"modality_entropy": found}


def _observers(call: Observation, *, by_head: bool) -> Tensor:
    assert call.valid is not None
    assert call.visual is not None
    assert call.seen_visual is not None
    last = slice(-call.window, None)
    before = call.seen_visual | call.visual[:, : -call.window].any(1)
    observing = observing_queries(call.valid[:, last], call.visual[:, last], before)
    queries, visible = call.queries[:, :, last], call.visible[:, :, last]
    return observer_rows(queries, call.keys, visible, call.scaling, observing, by_head=by_head)


def _nothing(call: Observation) -> dict[str, Tensor]:
    return {}


COLLECTORS: dict[str, Collector | None] = {
    "none": None,
    "keys_values": None,
    "gate": None,
    "window_rows": Collector(_window_rows, ("window_rows",), newest=True, rolls=True),
    "column_sums": Collector(_column_sums, ("column_sums",), accumulates=True),
    "text_rows": Collector(_text_rows, TEXT_STATISTICS, accumulates=True),
    "window_peaks": Collector(_window_peaks, ("window_peaks",), newest=True, rolls=True),
    "window_moments": Collector(_window_moments, MOMENTS, newest=True),
    "output_norm": Collector(_output_norm, ("output_norm",)),
    "query_moments": Collector(_query_moments, EXPECTED),
    OBSERVED: Collector(lambda call: {OBSERVED: _observers(call, by_head=False)}, (OBSERVED,), newest=True, rolls=True),
    OBSERVED_HEADS: Collector(
        lambda call: {OBSERVED_HEADS: _observers(call, by_head=True)}, (OBSERVED_HEADS,), newest=True, rolls=True
    ),
    "modality_entropy": Collector(_modality_entropy, ("modality_entropy",), accumulates=True),
    "text_density": Collector(_text_density, DENSITY, accumulates=True),
    REPEATED: Collector(_nothing, (REPEATED,), accumulates=True, newest=True),
    FORESEEN: Collector(_nothing, (FORESEEN,), accumulates=True, newest=True),
}


def rows_read(collectors: Iterable[str], queries: int, window: int) -> int:
    """How many of a forward's newest queries the collectors look at."""
    known = [COLLECTORS[name] for name in collectors]
    if any(x is not None and not x.newest for x in known):
        return queries
    return min(queries, max(window, MOMENT_ROWS))


def statistics_of(collectors: Iterable[str], *, accumulating: bool = False, rolling: bool = False) -> set[str]:
    """Names of the statistics that some collectors keep; those alone that add up over forwards, or roll, if asked."""
    known = (COLLECTORS[name] for name in collectors)
    wanted = (x for x in known if x is not None and (x.accumulates or not accumulating) and (x.rolls or not rolling))
    return {name for x in wanted for name in x.names}
