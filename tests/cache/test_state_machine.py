"""Random conversations: whatever the order of calls, the cache keeps its promises."""

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from retention import Budget, CacheConfig, evicting
from tests.cache.helpers import (
    DECODING,
    KV_HEADS,
    LAYERS,
    Conversation,
    gates_of,
    left_padded,
    model_of,
    same,
    small,
    tokens,
)
from tests.cache.test_ledger import assert_ledger

BUDGET, SINKS, RECENT = 6, 1, 2
ROWS = 2


class CacheMachine(RuleBasedStateMachine):
    """One source cache and at most one fork at a time; `told` is the one that is fed."""

    @initialize(
        name=st.sampled_from(DECODING),
        scope=st.sampled_from(["uniform", "global"]),
        positions=st.sampled_from(["original", "packed"]),
        every=st.sampled_from([None, 1, 3]),
        chunk=st.sampled_from([None, 5]),
        length=st.integers(2, 14),
        short=st.integers(1, 14),
    )
    def prefill(self, name, scope, positions, every, chunk, length, short):
        self.config = CacheConfig(
            Budget(float(BUDGET)),
            allocator=scope,
            positions=positions,
            evict_every=every,
            prefill_chunk=chunk,
            sink_size=SINKS,
            recent_size=RECENT,
        )
        self.context = evicting(
            model_of(), small(name), self.config, gates=gates_of(), extra_collectors=("gate", "column_sums")
        )
        self.cache = self.context.__enter__()
        self.told = Conversation(model_of(), self.cache)
        self.seen = torch.zeros(ROWS, dtype=torch.long)
        self.fed = self.draws = 0
        self.held = self.asked = False
        self.previous = torch.zeros(LAYERS, ROWS, KV_HEADS, dtype=torch.long)
        self.source = None
        self.feed(length, short)

    def feed(self, count, short):
        cache = self.told.cache
        before = cache.kept() if self.fed else self.previous
        ids, mask = left_padded(tokens(ROWS, count, seed=self.draws), [count, min(short, count)])
        logits = self.told.feed(ids, mask)
        assert torch.isfinite(logits[mask.bool()]).all()
        self.draws += 1
        self.fed += count
        self.seen = self.seen + mask.sum(1)
        self.added = before + mask.sum(1)[None, :, None]
        self.asked = not self.held and (count > 1 or self.config.evict_every == 1)

    @rule(count=st.integers(2, 9), short=st.integers(1, 9))
    def append(self, count, short):
        self.feed(count, short)

    @rule()
    def decode(self):
        self.feed(1, 1)

    @rule()
    def evict(self):
        self.told.cache.evict()
        self.added = None
        self.asked = True

    @precondition(lambda self: not self.held)
    @rule()
    def hold(self):
        self.holding = self.told.cache.hold()
        self.holding.__enter__()
        self.held, self.added = True, None

    @precondition(lambda self: self.held)
    @rule()
    def release(self):
        self.holding.__exit__(None, None, None)
        self.held = self.asked = False

    @precondition(lambda self: self.source is None and not self.held)
    @rule(same=st.booleans(), name=st.sampled_from(DECODING))
    def fork(self, same, name):
        cache = self.told.cache
        can = name in ("h2o", "trim_kv", "db_trim_kv") and not cache.extra_collectors
        twin = cache.fork() if same or can else cache.fork(small(name), self.config)
        self.source = (self.told, self.seen, self.fed, [x.clone() for g in cache.tensors().values() for x in g])
        mask, self.told = self.told.mask, Conversation(model_of(), twin)
        self.told.mask = mask
        self.asked, self.added = False, None
        assert torch.equal(twin.kept_table(), cache.kept_table())

    @precondition(lambda self: self.source is not None and not self.held)
    @rule()
    def back_to_the_source(self):
        self.told, self.seen, self.fed, before = self.source
        after = [x for g in self.told.cache.tensors().values() for x in g]
        assert len(before) == len(after)
        assert all(same(a, b) for a, b in zip(before, after, strict=True))
        self.source, self.asked, self.added = None, False, None

    @invariant()
    def promises(self):
        if not hasattr(self, "told"):
            return
        cache = self.told.cache
        kept = cache.kept()
        assert cache.get_seq_length() == self.fed
        assert torch.equal(cache.seen(), self.seen)
        assert_ledger(cache)
        assert cache.bytes().peak >= cache.bytes().total
        if self.asked:
            budget = BUDGET * torch.ones_like(self.seen)
            limit = torch.minimum(budget, self.seen)
            if self.config.allocator == "uniform":
                assert (kept <= limit[None, :, None]).all()
            assert (kept.sum((0, 2)) <= limit * LAYERS * KV_HEADS).all()
        elif self.held and self.added is not None:
            assert torch.equal(kept, self.added)
        table = cache.kept_table()
        assert torch.equal(table.sum(-1), kept)
        for row, seen in enumerate(self.seen.tolist()):
            assert table[:, row, :, : min(SINKS, seen)].all()
            assert table[:, row, :, max(0, seen - RECENT) : seen].all()
            assert not table[:, row, :, seen:].any()
        for layer in cache.evicting_layers:
            state = layer.state()
            for row in range(ROWS):
                for head in range(KV_HEADS):
                    places = state.positions[row, head][state.valid[row, head]]
                    assert (places.diff() > 0).all()

    def teardown(self):
        if hasattr(self, "context"):
            self.context.__exit__(None, None, None)


CacheMachine.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestCache = CacheMachine.TestCase
