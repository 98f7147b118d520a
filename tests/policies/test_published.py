"""TOVA, PyramidKV, AdaKV, LOOK-M and the oracle: what each keeps, on hand-made states and in a real model."""

from dataclasses import replace

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.policies.adakv import AdaKV
from retention.policies.look_m import LookM
from retention.policies.oracle import Oracle
from retention.policies.pyramidkv import PyramidKV
from retention.policies.snapkv import SnapKV
from retention.policies.tova import TOVA
from tests.cache.helpers import KV_HEADS, LAYERS, Conversation, left_padded, model_of, small, tokens
from tests.policies.test_matrix import HEADS, KEYS, ROWS, chosen, state, winners

BUDGETS = torch.tensor([6, 6])


def marked(*places: int) -> torch.Tensor:
    return torch.isin(torch.arange(KEYS), torch.tensor(places)).expand(ROWS, HEADS, KEYS).clone()


def test_tova_keeps_what_the_last_query_attends_to_in_all_heads_alike():
    kv = state()
    last = kv.statistics["window_rows"][:, :, -1].mean(1)
    assert torch.allclose(TOVA().score(kv), last[:, None].expand(-1, HEADS, -1))
    masks = winners([kv], TOVA(), CacheConfig(Budget(6.0)), BUDGETS)[0]
    assert (masks == masks[:, :1]).all()
    for row in range(ROWS):
        expected = {*last[row, :-1].topk(5).indices.tolist(), KEYS - 1}
        assert set(torch.nonzero(masks[row, 0]).flatten().tolist()) == expected
    assert TOVA().observed_rows == 1
    assert torch.equal(TOVA().score(chosen(kv, torch.tensor([0, 3, 7]))), TOVA().score(kv)[..., [0, 3, 7]])


def test_tova_follows_every_decoded_token_and_says_when_it_cannot():
    ids, mask = left_padded(tokens(2, 20, seed=1), [20, 13])
    with evicting(model_of(), TOVA(), CacheConfig(Budget(6.0), evict_every=1)) as cache:
        told = Conversation(model_of(), cache)
        told.feed(ids, mask)
        for step in range(5):
            told.feed(tokens(2, 1, seed=step))
            table = cache.kept_table()
            assert (table == table[:, :, :1]).all()
            assert (table.sum(-1) == 6).all()
    with evicting(model_of(), TOVA(), CacheConfig(Budget(6.0))) as cache:
        told = Conversation(model_of(), cache)
        told.feed(ids, mask)
        told.feed(tokens(2, 1))
        with pytest.raises(ValueError, match="newest query"):
            cache.evict()


def test_one_score_under_three_allocators():
    kv, sizes = state(), {"window_size": 4, "kernel_size": 3}
    snap = SnapKV(**sizes)
    for policy, allocator in ((PyramidKV(**sizes), "pyramid"), (AdaKV().over(snap), "head_adaptive")):
        assert torch.equal(policy.score(kv), snap.score(kv))
        assert policy.allocator == allocator
    with pytest.raises(ValueError, match=r"pyramidkv\.window_size"):
        PyramidKV(window_size=0)


def test_pyramidkv_falls_linearly_over_the_layers():
    """`b = 10 - 4`, `lo = 4 + 6 / 20`, `hi = 4 + 12 - 6 / 20` for budget 10 and window 4, and an exact total."""
    states = [state(keys=40, layer=layer) for layer in range(3)]
    masks = winners(states, PyramidKV(window_size=4), CacheConfig(Budget(10.0)), torch.tensor([10, 10]))
    counts = masks.sum(-1)
    assert (counts == torch.tensor([16, 10, 4])[:, None, None]).all()
    assert masks[:2, ..., -4:].all()
    assert masks[2, ..., -2:].all(), "never more than half of what a layer holds"


def test_adakv_pools_the_heads_of_a_layer_above_a_floor():
    kv = state()
    rows = kv.statistics["window_rows"]
    kv.statistics["window_rows"] = rows * torch.tensor([10.0, 1.0, 0.001])[None, :, None, None]
    policy = AdaKV().over(SnapKV(window_size=1, kernel_size=1))
    masks = winners([kv], policy, CacheConfig(Budget(6.0), head_floor=0.5), BUDGETS)[0]
    assert masks.sum((1, 2)).tolist() == [18, 18]
    assert (masks.sum(-1)[:, 2] == 3).all()
    assert (masks.sum(-1)[:, 0] > 6).all()
    scores = policy.score(kv)
    for row in range(ROWS):
        order = scores[row, 2, :-1].argsort(descending=True)
        assert set(torch.nonzero(masks[row, 2]).flatten().tolist()) == {*order[:2].tolist(), KEYS - 1}


def test_look_m_keeps_recent_entries_then_text_then_images():
    kv = replace(state(), visual=marked(0, 1, 3, 4, 5, 6, 7, 9))
    sums = kv.statistics["column_sums"]
    masks = winners([kv], LookM(recent_share=0.25), CacheConfig(Budget(6.0)), BUDGETS)[0]
    assert masks[..., [2, 8, 10, 11]].all(), "text, the recent entry included"
    for row in range(ROWS):
        for head in range(HEADS):
            images = sums[row, head].masked_fill(~kv.visual[row, head], -1.0).topk(2).indices
            assert masks[row, head, images].all()
    masks = winners([kv], LookM(recent_share=0.0), CacheConfig(Budget(3.0)), torch.tensor([3, 3]))[0]
    assert not (masks & kv.visual).any(), "text that exceeds the budget leaves no image"
    assert (masks.sum(-1) == 3).all()
    with pytest.raises(ValueError, match=r"lookm\.recent_share"):
        LookM(recent_share=1.0)


def test_the_oracle_keeps_evidence_and_then_the_newest():
    kv = replace(state(), evidence=marked(1, 4))
    masks = winners([kv], Oracle(), CacheConfig(Budget(6.0)), BUDGETS)[0]
    assert torch.equal(masks, marked(1, 4, 8, 9, 10, 11))
    assert torch.equal(winners([state()], Oracle(), CacheConfig(Budget(6.0)), BUDGETS)[0], marked(*range(6, 12)))


@pytest.mark.parametrize("chunk", [None, 5])
def test_evidence_is_named_by_position_whatever_the_padding(chunk, tmp_path):
    ids, mask = left_padded(tokens(2, 20, seed=1), [20, 13])
    evidence = torch.zeros(2, 9, dtype=torch.bool)
    evidence[0, 8] = evidence[1, 2] = True
    with evicting(model_of(), small("oracle"), CacheConfig(Budget(4.0), prefill_chunk=chunk)) as cache:
        told = Conversation(model_of(), cache)
        told.feed(ids, mask)
        assert not cache.kept_table()[:, 0, :, 8].any()
        cache.reset()
        told.mask = None
        cache.mark_evidence(evidence)
        told.feed(ids, mask)
        table = cache.kept_table()
        assert table[:, 0, :, [8, 17, 18, 19]].all()
        assert table[:, 1, :, [2, 10, 11, 12]].all()
        assert table.sum() == 2 * 4 * LAYERS * KV_HEADS
        cache.save(tmp_path / "saved")
        cache.reorder_cache(torch.tensor([1, 0]))
        told.mask = told.mask[[1, 0]]
        told.feed(tokens(2, 6))
        assert cache.kept_table()[:, 0, :, 2].all()
        assert cache.kept_table()[:, 1, :, 8].all()
    with evicting(model_of(), small("oracle"), CacheConfig(Budget(4.0))) as cache:
        cache.restore(tmp_path / "saved")
        told = Conversation(model_of(), cache)
        told.mask = mask
        told.feed(tokens(2, 6))
        assert cache.kept_table()[:, 0, :, 8].all()
