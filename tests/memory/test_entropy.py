"""Entropy of tokens and the retention score: naive twin, edge cases, and what `pointwise` cannot tell apart."""

import pytest
import torch

from retention.ops.entropy import (
    ENTROPIES,
    OBSERVERS,
    naive_token_entropy,
    observed_by,
    observer_rows,
    observing_queries,
    retention_score,
    token_entropy,
)
from retention.policies.retentive import Retentive
from retention.types import KVState

EVERY = torch.ones(1, 1, 6, dtype=torch.bool)


def drawn(groups=3, rows=5, keys=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 2, rows, groups, keys, generator=g)
    seen = torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]
    valid = torch.arange(keys).expand(2, 2, keys) >= torch.tensor([0, 2])[:, None, None]
    allowed = seen[:, None] & valid[:, :, None, None]
    allowed[0, :, 1:2] = False
    rows = logits.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    rows[1, 1, :, :, 5] = 0.0
    return rows, torch.rand(2, 2, keys, generator=g) < 0.5, valid


@pytest.mark.parametrize("kind", ENTROPIES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_all_at_once_equals_one_by_one(kind, groups, rows):
    given = drawn(groups, rows)
    found = token_entropy(*given, kind)
    assert torch.allclose(found, naive_token_entropy(*given, kind), atol=1e-5)
    assert ((found >= 0) & (found <= 1)).all()
    assert found[~given[2]].eq(0).all()
    assert found[1, 1, 5] == 0


def one(rows, kind, visual=None):
    """Entropies of one head from rows [rows, groups, keys]."""
    rows = torch.as_tensor(rows, dtype=torch.float32)[None, None]
    valid = torch.ones(1, 1, rows.shape[-1], dtype=torch.bool)
    return token_entropy(rows, valid if visual is None else visual, valid, kind)[0, 0]


def test_a_uniform_column_is_1_and_one_query_s_is_0():
    found = one([[[0.2, 0.8, 0.0]], [[0.2, 0.0, 0.8]], [[0.2, 0.0, 0.8]]], "across_queries")
    assert torch.allclose(found, torch.tensor([1.0, 0.0, 1.0]), atol=1e-6)
    found = one([[[0.2, 0.8], [0.2, 0.0]]], "across_heads")
    assert torch.allclose(found, torch.tensor([1.0, 0.0]), atol=1e-6)


def test_what_could_not_see_is_not_counted_and_what_ignored_is():
    tiny = torch.finfo(torch.float32).tiny
    found = one([[[0.5, 0.5]], [[0.5, 0.5]], [[0.5, tiny]]], "across_queries")
    assert torch.allclose(found, torch.tensor([1.0, torch.tensor(2.0).log() / torch.tensor(3.0).log()]), atol=1e-5)
    assert torch.allclose(one([[[0.5, 0.5]], [[0.5, 0.5]], [[0.5, 0.0]]], "across_queries"), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("kind", ENTROPIES)
def test_zero_mass_and_a_single_witness_have_no_entropy(kind):
    tiny = torch.finfo(torch.float32).tiny
    assert one([[[1.0, tiny]], [[1.0, tiny]]], kind)[1] == 0
    if kind != "pointwise":
        assert one([[[0.3, 0.7]]], kind).eq(0).all()


def test_pointwise_ranks_one_row_like_attention_below_its_peak_and_not_above():
    row = torch.tensor([0.02, 0.3, 0.1, 0.25, 0.05, 0.28])
    found = one(row[None, None], "pointwise")
    assert torch.equal(found.argsort(), row.argsort())
    assert one([[[0.9, 0.1]]], "pointwise").argmax() == 1
    assert torch.allclose(one([[[1 / torch.e, 1 - 1 / torch.e]]], "pointwise")[0], torch.tensor(1.0), atol=1e-6)


def test_pointwise_shares_are_among_the_token_s_own_modality():
    rows, visual = [[[0.1, 0.1, 0.4, 0.4]]], torch.tensor([[[True, True, False, False]]])
    assert torch.allclose(one(rows, "pointwise", visual), one([[[0.5, 0.5, 0.5, 0.5]]], "pointwise", visual))


def test_text_behind_the_last_image_observes_and_else_everything():
    valid = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6, [1] * 6, [1] * 6]).bool()
    visual = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0] * 6, [0] * 6]).bool()
    found = observing_queries(valid, visual, torch.tensor([False, False, False, True]))
    assert found.tolist() == [[False] * 4 + [True] * 2, [True] * 6, [True] * 6, [True] * 6]
    assert not observing_queries(valid[:1], visual[:1], torch.tensor([True]))[0, 1]


def test_rows_tell_what_was_ignored_from_what_was_hidden():
    g = torch.Generator().manual_seed(0)
    queries, keys = 60 * torch.randn(1, 4, 6, 8, generator=g), torch.randn(1, 2, 6, 8, generator=g)
    visible = torch.ones(6, 6, dtype=torch.bool).tril().expand(1, 2, 6, 6)
    observing = torch.tensor([[False, True, True, True, True, True]])
    for by_head, groups in ((True, 2), (False, 1)):
        rows = observer_rows(queries, keys, visible, 1.0, observing, by_head=by_head)
        assert rows.shape == (1, 2, 6, groups, 6)
        assert torch.equal(rows > 0, (visible & observing[:, None, :, None])[:, :, :, None].expand(rows.shape))
        assert torch.allclose(rows[:, :, 1:].sum(-1), torch.ones(1, 2, 5, groups), atol=1e-5)


def test_the_newest_rows_alone_are_read():
    rows = torch.rand(1, 1, OBSERVERS + 3, 1, 6)
    old = rows.clone()
    old[:, :, :3] = 0.9
    for a, b in zip(
        observed_by(rows, EVERY, EVERY, "across_queries"), observed_by(old, EVERY, EVERY, "across_queries"), strict=True
    ):
        assert torch.equal(a, b)


def state(rows, name="observers"):
    keys = rows.shape[-1]
    shape = (*rows.shape[:2], keys)
    return KVState(
        lambda: (torch.zeros(*shape, 2),) * 2, torch.arange(keys).expand(shape), torch.ones(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool), torch.full((shape[0],), keys),
        statistics={name: rows},
    )  # fmt: skip


def test_the_score_mixes_attention_and_entropy():
    rows = torch.tensor([[[0.7, 0.2, 0.1, 0.0]], [[0.1, 0.2, 0.1, 0.6]], [[0.1, 0.2, 0.1, 0.6]]])[None, None]
    for lam in (0.0, 0.25, 1.0):
        found = Retentive(lam=lam).score(state(rows))[0, 0]
        attention = torch.tensor([2 / 3, 1 / 3, 0.0, 1.0])
        entropy = token_entropy(rows, *(torch.ones(1, 1, 4, dtype=torch.bool),) * 2, "across_queries")[0, 0]
        assert torch.allclose(found, lam * attention + (1 - lam) * entropy, atol=1e-6)
        assert torch.allclose(found, retention_score(entropy[None, None], attention[None, None], lam)[0, 0], atol=1e-6)
    wide = Retentive(lam=0.0).score(state(rows))[0, 0]
    assert wide[1] > wide[0]
    assert Retentive(lam=1.0).score(state(rows))[0, 0].argmax() == 3


def test_first_and_newest_entries_stay():
    policy = Retentive(sinks=2, window_size=3)
    assert policy.tiers(state(torch.rand(1, 1, 4, 1, 6)))[0, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert (policy.recent(100), policy.recent(4)) == (3, 2)
    assert Retentive(entropy="across_heads").collectors == ("observers_by_head",)


@pytest.mark.parametrize("wrong", [{"lam": 1.5}, {"entropy": "x"}, {"sinks": -1}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match="expected retentive"):
        Retentive(**wrong)
