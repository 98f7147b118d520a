"""What real policies keep of the procedural tasks: whether the cells that are left still tell the answer.

No model answers here. A random one fills the caches, a token per cell, and a solver reads the cells that any layer and
head still holds: of the policies here none looks at what a token says.
"""

from itertools import product

import numpy as np
import pytest
import torch

from retention.attach.forward import next_logits
from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.policies import POLICIES
from retention.tasks.deferred_region import DeferredRegion
from retention.tasks.diffuse_count import DiffuseCount
from retention.tasks.doc_pages import DocPages
from retention.tasks.haystack_any_all import HaystackAnyAll
from retention.tasks.multi_query import MultiQuery
from retention.tasks.needle import Needle
from retention.tasks.state_change import StateChange
from retention.tasks.stream_video import StreamVideo
from retention.tasks.three_statements import ThreeStatements
from retention.tasks.tile_index import TileIndex
from tests import tiny
from tests.cache.helpers import tokens
from tests.tasks.seen import Recorder, seen
from tests.tasks.test_suite_solved import score, scored

CONTEXTS = 6
RETRIEVAL = {
    "needle": Needle(n_images=8),
    "index": Needle(kind="index", n_images=8),
    "deferred_region": DeferredRegion(),
    "multi_query": MultiQuery(n_images=8, n_needles=12, n_turns=4),
    "diffuse_count": DiffuseCount(n_images=8),
    "three_statements": ThreeStatements(shown="image"),
    "doc_pages": DocPages(n_pages=4),
    "tile_index": TileIndex(),
    "haystack_any_all": HaystackAnyAll(n_images=6),
    "stream_video": StreamVideo(n_frames=12, n_events=4),
    "last_state": StateChange(n_frames=8),
}


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_llama()


@pytest.fixture
def told(monkeypatch, model):
    """Mean score of the solver on what each policy leaves of a task's cells, by policy and budget."""
    recorder = Recorder(monkeypatch)

    def of(task, policies, budgets):
        drawn, found = [recorder.example(task, i) for i in range(CONTEXTS)], {}
        places = list(np.ndindex(*drawn[0][1].shape))
        asked = torch.zeros(CONTEXTS, len(places), dtype=torch.bool)
        for row, (example, _) in enumerate(drawn):
            refs = [ref for turn in scored(example) for ref in turn.evidence]
            asked[row, [places.index((ref.image, ref.row, ref.column)) for ref in refs]] = True
        ids = tokens(CONTEXTS, len(places), seed=0)
        for name, budget in product(policies, budgets):
            config = CacheConfig(Budget(budget, "fraction"), sink_size=0, recent_size=0)
            with evicting(model, POLICIES[name](), config) as cache:
                cache.mark_evidence(asked)
                next_logits(model, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
                held = cache.kept_table().any(0).any(1)
            found[name, budget] = np.mean(
                [
                    score(task, turn, seen(example, words, [("cell", *places[i]) for i in row.nonzero().flatten()]))
                    for (example, words), row in zip(drawn, held, strict=True)
                    for turn in scored(example)
                ]
            )
        return found

    return of


@pytest.mark.parametrize("name", RETRIEVAL)
def test_who_keeps_the_evidence_first_is_never_behind_who_keeps_anything(name, told):
    found = told(RETRIEVAL[name], ("oracle", "random"), (0.05, 0.2, 0.5))
    for budget in (0.05, 0.2, 0.5):
        assert found["oracle", budget] >= found["random", budget], budget
    assert found["oracle", 0.5] > 0.9


def test_a_recent_window_wins_where_only_the_newest_state_counts_and_loses_a_needle(told):
    newest = told(StateChange(n_frames=12, n_changes=11), ("streaming_llm", "random"), (0.1,))
    needle = told(Needle(n_images=12, depth=0.0), ("streaming_llm", "oracle"), (0.1,))
    assert newest["streaming_llm", 0.1] == 1
    assert newest["random", 0.1] < 0.9
    assert needle["streaming_llm", 0.1] < needle["oracle", 0.1] == 1
