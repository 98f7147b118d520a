"""AdaKV, CriticalKV and quota around any policy: what they change, and that the rest is that policy's."""

from typing import Any

import pytest
import torch

from retention import POLICIES, Budget, CacheConfig, evicting
from retention.config import compose
from retention.policies.adakv import AdaKV
from retention.policies.criticalkv import CriticalKV
from retention.policies.expected_attention import ExpectedAttention
from retention.policies.keydiff import KeyDiff
from retention.policies.quota import Quota
from retention.policies.snapkv import SnapKV
from retention.policies.tgv_kv import TGVKV
from retention.policies.wrapper import FOLLOWED, Wrapper
from tests.cache.helpers import KV_HEADS, LAYERS, Conversation, model_of, small, tokens
from tests.policies.test_matrix import HEADS, KEYS, state, winners

WRAPPERS = sorted(name for name, policy in POLICIES.items() if issubclass(policy, Wrapper))
BASES = sorted(n for n, policy in POLICIES.items() if policy.evicts and n not in WRAPPERS and not policy.gates_of)
BUDGETS = torch.tensor([6, 4])
SHARES = [[1.0, 2.0, 3.0], [3.0, 0.0, 1.0], [1.0, 1.0, 1.0]]


def states() -> list[Any]:
    return [state(layer=n) for n in range(3)]


def kept(policy: Any, **changes: Any) -> Any:
    return winners(states(), policy, CacheConfig(Budget(6.0), **changes), BUDGETS)


def test_the_wrappers_are_these() -> None:
    assert WRAPPERS == ["adakv", "criticalkv", "quota"]
    assert (AdaKV().base, CriticalKV().base, Quota().base) == ("snapkv", "snapkv", "keydiff")


@pytest.mark.parametrize("base", BASES)
def test_adakv_and_quota_are_their_base_under_another_allocator(base):
    plain = POLICIES[base]()
    assert torch.equal(kept(AdaKV(base=base)), kept(plain, allocator="head_adaptive", selector="head"))
    given = {"quota": SHARES, "allocator": "quota", "selector": "head"}
    assert torch.equal(kept(Quota(base=base), quota=SHARES), kept(plain, **given))


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("base", BASES)
def test_everything_else_is_the_bases(name, base):
    plain = POLICIES[base]()
    wrapper = POLICIES[name](base=base)
    own = {"first_share"} if name == "criticalkv" else set()
    for key in {*FOLLOWED, "least", "redistributes", "observed_rows", "needs_gates", "steps", "weighs_layers"} - own:
        assert getattr(wrapper, key) == getattr(plain, key), key
    assert set(wrapper.collectors) - {"output_norm"} == set(plain.collectors)
    assert [wrapper.recent(n) for n in (3, 8, 40)] == [plain.recent(n) for n in (3, 8, 40)]


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_class_says_what_its_default_base_does(name):
    """What reads the class without an object, such as tables of what evicts while decoding, reads the same."""
    kind = POLICIES[name]
    for key in (*FOLLOWED, "allocator", "selector"):
        assert getattr(kind, key) == getattr(kind(), key), key


@pytest.mark.parametrize("base", ["h2o", "keydiff", "knorm", "expected_attention", "tova"])
def test_criticalkv_fills_the_second_half_of_any_base_by_the_output(base):
    policy, plain = CriticalKV(base=base), POLICIES[base]().without_value_norm()
    masks = kept(policy)
    for layer, kv in enumerate(states()):
        score = plain.score(kv)
        for row, budget in enumerate(BUDGETS.tolist()):
            for head in range(HEADS):
                own = score[row, head]
                second = (own - min(float(own.min()), 0.0) + 1e-4) * kv.statistics["output_norm"][row, head]
                found = set(range(KEYS - plain.recent(budget), KEYS))
                for ranks, until in ((own, budget // 2), (second, budget)):
                    for slot in ranks.argsort(descending=True).tolist():
                        if len(found) < until:
                            found.add(slot)
                assert set(torch.nonzero(masks[layer, row, head]).flatten().tolist()) == found


def test_what_is_protected_counts_in_the_first_half():
    masks = kept(CriticalKV(base="knorm"), sink_size=2)
    for layer, kv in enumerate(states()):
        score = POLICIES["knorm"]().score(kv)
        for row, budget in enumerate(BUDGETS.tolist()):
            for head in range(HEADS):
                own, first = score[row, head], {0, 1}
                for slot in own.argsort(descending=True).tolist():
                    if len(first) < budget // 2:
                        first.add(slot)
                second = (own - own.min() + 1e-4) * kv.statistics["output_norm"][row, head]
                for slot in second.argsort(descending=True).tolist():
                    if len(first) < budget:
                        first.add(slot)
                assert set(torch.nonzero(masks[layer, row, head]).flatten().tolist()) == first


def test_two_stages_follow_in_the_budgets_of_heads_that_the_first_score_gave():
    both = (CriticalKV(base="adakv"), AdaKV(base="criticalkv"))
    counts = kept(AdaKV()).sum(-1)
    for masks in map(kept, both):
        assert torch.equal(masks.sum(-1), counts)
        assert not torch.equal(masks, kept(AdaKV()))
    assert torch.equal(*map(kept, both))
    layer = states()[0]
    score = SnapKV().score(layer)
    for head in range(HEADS):
        slots = torch.nonzero(kept(both[0])[0, 0, head]).flatten().tolist()
        window = set(range(KEYS - 3, KEYS))
        first = [s for s in score[0, head].argsort(descending=True).tolist() if s not in window]
        stage = max(0, int(counts[0, 0, head]) // 2 - 3)
        assert {*window, *first[:stage]} <= set(slots)


def test_a_norm_of_values_counts_once():
    base = ExpectedAttention()
    policy = CriticalKV().over(base)
    kv = state()
    assert torch.equal(policy.score(kv), ExpectedAttention(use_vnorm=False).score(kv))
    assert not torch.equal(policy.score(kv), base.score(kv))
    assert base.use_vnorm


@pytest.mark.parametrize(("alpha", "form"), [(0.0, "mix"), (0.5, "mix"), (1.0, "mix"), (0.5, "safeguard")])
def test_heads_are_moved_towards_the_average(alpha, form):
    """`B_h = (1 - alpha) count_h + alpha B`, with counts of the best `heads * B` of a layer."""
    policy, config = AdaKV(base="knorm"), {"head_floor": alpha, "head_form": form}
    counts = kept(policy, **config).sum(-1)
    assert (counts.sum(-1) == HEADS * BUDGETS).all()
    for layer, kv in enumerate(states()):
        for row, budget in enumerate(BUDGETS.tolist()):
            best = policy.score(kv)[row].flatten().topk(HEADS * budget).indices // KEYS
            won = torch.bincount(best, minlength=HEADS)
            if form == "mix":
                wanted = (1 - alpha) * won + alpha * budget
                assert ((counts[layer, row] - wanted).abs() < 1).all()
            else:
                assert (counts[layer, row] >= int(alpha * budget)).all()
    with pytest.raises(ValueError, match=r"cache\.head_form among safeguard, mix"):
        CacheConfig(head_form="mean")


def test_mixed_counts_keep_each_heads_best():
    masks = kept(AdaKV(base="knorm"), head_floor=0.5, head_form="mix")
    for layer, kv in enumerate(states()):
        score = POLICIES["knorm"]().score(kv)
        for row in range(2):
            for head in range(HEADS):
                mine = masks[layer, row, head]
                assert torch.equal(
                    torch.nonzero(mine).flatten(), score[row, head].topk(int(mine.sum())).indices.sort().values
                )


def test_settings_of_the_base_are_those_of_its_preset():
    config = compose("eval", ["gates=null", "policy.adakv.base=keydiff", "policy.criticalkv.base=adakv"])
    assert config.policy["adakv"].inner is config.policy["keydiff"]
    assert config.policy["criticalkv"].inner is config.policy["adakv"]
    assert config.policy["criticalkv"].allocator == "head_adaptive"
    plain = compose("eval", ["gates=null", "policy.snapkv.window_size=3"])
    assert plain.policy["adakv"].inner.window_size == plain.policy["criticalkv"].observed_rows == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy.adakv.base=nothing"], "expected adakv.base among .*got 'nothing'"),
        (["policy.adakv.base=full"], "adakv.base that evicts, got 'full'"),
        (["policy.adakv.base=adakv"], "circle"),
        (["policy.adakv.base=criticalkv", "policy.criticalkv.base=adakv"], "circle of .*adakv"),
        (["policies=[memory+quota]"], "got 'memory\\+quota'"),
        (["policies=[quota+quota]"], "got 'quota\\+quota'"),
    ],
)
def test_impossible_bases_are_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        compose("eval", ["gates=null", *overrides])


def test_quota_without_a_table_says_what_to_do():
    with pytest.raises(ValueError, match=r"set cache\.quota.*quota\+X"):
        kept(Quota())
    with (
        evicting(model_of(), Quota(), CacheConfig(Budget(6.0))) as cache,
        pytest.raises(ValueError, match=r"set cache\.quota"),
    ):
        Conversation(model_of(), cache).feed(tokens(1, 20))


@pytest.mark.parametrize("base", ["keydiff", "h2o", "tgv_kv", "tova"])
def test_wrappers_in_a_model(base):
    table = [[1.0, 2.0]] * LAYERS
    for name in WRAPPERS:
        policy = POLICIES[name]().over(small(base))
        with evicting(model_of(), policy, CacheConfig(Budget(6.0), quota=table)) as cache:
            told = Conversation(model_of(), cache)
            told.feed(tokens(2, 20))
            assert cache.kept().sum((0, 2)).tolist() == [6 * LAYERS * KV_HEADS] * 2
            if name == "quota":
                assert cache.kept()[0, 0].tolist() == [4, 8]
            told.feed(tokens(2, 1))


def test_a_wrapper_may_be_around_an_object():
    base = KeyDiff()
    assert AdaKV().over(base).inner is base
    assert AdaKV().inner is not AdaKV().inner
    assert isinstance(AdaKV(base="tgv_kv").inner, TGVKV)
