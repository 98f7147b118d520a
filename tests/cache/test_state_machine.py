"""Random conversations: whatever the order of calls, the cache keeps its promises."""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from retention import Budget, CacheConfig, evicting
from retention.cache import storage
from tests.cache.helpers import (
    ANY_TIME,
    KV_HEADS,
    LASTING,
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


def assert_layout(store):
    """Counts, pages, owners and loose entries tell one story."""
    if store.counts is None:
        assert not store.pages
        assert store.front == 0
        return
    total = int(store.counts.sum())
    assert len(store.entries.positions) == total
    assert store.entries.log_beta is None or len(store.entries.log_beta) == total
    assert store.entries.coordinates is None or store.entries.coordinates.shape[1] == total
    assert store.longest >= int(store.counts.max())
    assert not store.uniform or bool((store.counts == store.longest).all())
    loose = store.loose_counts()
    assert (loose >= 0).all()
    if store.page_counts is None:
        assert store.owner is None
        assert not store.pages
    else:
        assert torch.equal(store.page_counts, store.counts // storage.PAGE)
        assert torch.equal(store.owner, torch.repeat_interleave(store.page_counts.flatten()))
        assert store.longest_pages >= int(store.page_counts.max())
        assert [len(x) for x in store.pages] == [int(store.page_counts.sum())] * 2
    if store.loose:
        assert store.front == store.tail == 0
        assert [len(x) for x in store.loose] == [int(loose.sum())] * 2
    else:
        assert store.front >= int(loose.max())
    assert len({(buffer.used, buffer.data.shape[:2]) for buffer in store.buffers}) == 1
    assert store.log_beta is None or store.log_beta.used == store.tail


class CacheMachine(RuleBasedStateMachine):
    """One source cache and at most one fork at a time; `told` is the one that is fed."""

    @initialize(
        name=st.sampled_from(ANY_TIME),
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
        self.name = name
        self.told = Conversation(model_of(), self.open())
        self.places = [[] for _ in range(ROWS)]
        self.seen = torch.zeros(ROWS, dtype=torch.long)
        self.fed = self.draws = 0
        self.held = self.asked = False
        self.previous = torch.zeros(LAYERS, ROWS, KV_HEADS, dtype=torch.long)
        self.source = None
        self.feed(length, short)

    def open(self):
        collected = {"extra_collectors": LASTING}
        self.context = evicting(model_of(), small(self.name), self.config, gates=gates_of(), **collected)
        return self.context.__enter__()

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

    @precondition(lambda self: max(map(len, self.places)) < 2)
    @rule(count=st.integers(2, 9), short=st.integers(1, 9), which=st.integers(0, 8))
    def append_protected(self, count, short, which):
        wanted = torch.zeros(ROWS, count, dtype=torch.bool)
        wanted[:, min(which, count - 1)] = True
        self.told.cache.protect(wanted)
        start = self.seen
        self.feed(count, short)
        new = self.told.mask[:, -count:]
        for row in range(ROWS):
            if new[row, min(which, count - 1)]:
                self.places[row] = [*self.places[row], int(start[row] + new[row, : min(which, count - 1)].sum())]

    @rule(rows=st.sampled_from([[1, 0], [0, 0], [1, 1]]))
    def reorder(self, rows):
        before = self.told.cache.kept_table()
        self.told.cache.reorder_cache(torch.tensor(rows))
        assert torch.equal(self.told.cache.kept_table(), before[:, rows])
        self.told.mask, self.seen = self.told.mask[rows], self.seen[rows]
        self.places = [self.places[row] for row in rows]
        self.added = None if self.added is None else self.added[:, rows]

    @precondition(lambda self: self.source is None and not self.held)
    @rule()
    def save_and_restore(self):
        """Into a fresh cache of another block; forks of both go on alike."""
        old = self.told.cache
        self.context.__exit__(None, None, None)
        new = self.open()
        with tempfile.TemporaryDirectory() as folder:
            old.save(Path(folder) / "saved")
            new.restore(Path(folder) / "saved")
        results = []
        for cache in (old.fork(), new.fork()):
            twin = Conversation(model_of(), cache)
            twin.mask = self.told.mask
            logits = [twin.feed(tokens(ROWS, count, seed=99)) for count in (1, 3, 1)]
            results.append([*logits, cache.kept_table(), cache.trigger.since_eviction])
        assert all(torch.equal(a, b) for a, b in zip(results[0][:-1], results[1][:-1], strict=True))
        assert results[0][-1] == results[1][-1]
        mask, self.told = self.told.mask, Conversation(model_of(), new)
        self.told.mask = mask
        self.asked, self.added = False, None

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
    @rule(same=st.booleans(), name=st.sampled_from(ANY_TIME))
    def fork(self, same, name):
        cache = self.told.cache
        can = bool(LASTING & {*small(name).collectors}) and not cache.extra_collectors
        twin = cache.fork() if same or can else cache.fork(small(name), self.config)
        self.source = (
            self.told,
            self.seen,
            self.fed,
            list(self.places),
            [x.clone() for g in cache.tensors().values() for x in g],
        )
        mask, self.told = self.told.mask, Conversation(model_of(), twin)
        self.told.mask = mask
        self.asked, self.added = False, None
        assert torch.equal(twin.kept_table(), cache.kept_table())

    @precondition(lambda self: self.source is not None and not self.held)
    @rule()
    def back_to_the_source(self):
        self.told, self.seen, self.fed, self.places, before = self.source
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
            assert table[:, row, :, self.places[row]].all()
        for layer in cache.evicting_layers:
            state = layer.state()
            assert_layout(layer.store)
            for row in range(ROWS):
                for head in range(KV_HEADS):
                    places = state.positions[row, head][state.valid[row, head]]
                    assert (places.diff() > 0).all()

    def teardown(self):
        if hasattr(self, "context"):
            self.context.__exit__(None, None, None)


CacheMachine.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestCache = CacheMachine.TestCase
