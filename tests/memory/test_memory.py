"""Memories of evicted tokens: exact where they can be, empty where nothing left, the same whatever the order of calls."""

import pytest
import torch

from retention.memory import MEMORIES, Evicted, RetentionMemory, state_bytes
from retention.memory.linear import Linear
from retention.memory.moment import Moment
from retention.memory.slots import Slots
from retention.types import ModelShape

SHAPE = ModelShape("llama", (0, 1), 4, 2, 8, 32)
BATCH, HEADS, WIDTH, QUERIES = 2, 2, 8, 3
KINDS = [Linear(), Linear(feature_map="hedgehog"), Linear(feature_map="elu1"), Linear(readout="gated"), Linear(vision_decay="step"),
         Slots(4), Slots(64), Moment(), Moment("full")]  # fmt: skip


def drawn(count, seed=0, keep=1.0):
    g = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, count)
    return Evicted(
        torch.randn(*shape, WIDTH, generator=g), torch.randn(*shape, WIDTH, generator=g), torch.rand(shape, generator=g) < keep,
        torch.rand(shape, generator=g) < 0.5, torch.randn(shape, generator=g), torch.rand(shape, generator=g),
        torch.rand(shape, generator=g), WIDTH**-0.5,
    )  # fmt: skip


def part(evicted, entries):
    cut = {k: v[:, :, entries] for k, v in vars(evicted).items() if k != "scaling"}
    return Evicted(**cut, scaling=evicted.scaling)


def queries(seed=9):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 4, QUERIES, WIDTH, generator=g)


def attention(query, keys, values, mask):
    """Output and log-sum-exp over the masked entries, written out."""
    keys, values, mask = (x.repeat_interleave(2, 1) for x in (keys, values, mask))
    logits = (WIDTH**-0.5 * query @ keys.transpose(-1, -2)).masked_fill(~mask[:, :, None], float("-inf"))
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().nan_to_num() @ values, lse


def layer_of(config):
    torch.manual_seed(1)
    layer = config.build(SHAPE)
    for p in layer.parameters():
        if p.dim() > 2:
            torch.nn.init.normal_(p, std=0.5)
    return layer


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_an_empty_memory_changes_nothing(config):
    layer, out, lse = layer_of(config), torch.randn(BATCH, 4, QUERIES, WIDTH), torch.randn(BATCH, 4, QUERIES)
    empty = layer.empty(BATCH, out.device)
    assert torch.equal(layer.read(empty, queries(), out, lse, 0.3), out)
    nobody = layer.absorb(empty, drawn(5, keep=0.0))
    assert torch.equal(layer.read(nobody, queries(), out, lse, 0.3), out)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_what_stays_is_not_absorbed(config):
    layer, evicted = layer_of(config), drawn(12, keep=0.5)
    one = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    changed = drawn(12, keep=0.5)
    changed.keys[~changed.mask], changed.values[~changed.mask] = 50.0, -50.0
    other = layer.absorb(layer.empty(BATCH, torch.device("cpu")), changed)
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


@pytest.mark.parametrize("config", [k for k in KINDS if not isinstance(k, Slots)], ids=str)
def test_two_evictions_equal_one(config):
    layer, evicted = layer_of(config), drawn(12, keep=0.8)
    empty = layer.empty(BATCH, torch.device("cpu"))
    once = layer.absorb(empty, evicted)
    twice = layer.absorb(layer.absorb(empty, part(evicted, slice(0, 5))), part(evicted, slice(5, 12)))
    assert all(torch.allclose(once[k], twice[k], atol=1e-4) for k in once)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_sequences_do_not_mix(config):
    layer, evicted = layer_of(config), drawn(12, keep=0.8)
    both = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    own = Evicted(**{k: v[1:] for k, v in vars(evicted).items() if k != "scaling"}, scaling=evicted.scaling)
    alone = layer.absorb(layer.empty(1, torch.device("cpu")), own)
    assert all(torch.allclose(both[k][1:], alone[k], atol=1e-6) for k in both)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_the_declared_bytes_are_those_of_the_state(config):
    memory = RetentionMemory(config, SHAPE)
    state = memory.layer(0).absorb(memory.layer(0).empty(BATCH, torch.device("cpu")), drawn(5))
    assert state_bytes(state) * len(SHAPE.layers) == memory.state_bytes() * BATCH


@pytest.mark.parametrize("config", KINDS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_nothing_explodes_forward_or_backward(config, count):
    layer = layer_of(config)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), drawn(count))
    out = layer.read(state, 20 * queries(), torch.randn(BATCH, 4, QUERIES, WIDTH), torch.randn(BATCH, 4, QUERIES), 1.0)
    assert torch.isfinite(out).all()
    if config.trained and count:
        out.square().sum().backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert grads
        assert all(torch.isfinite(g).all() for g in grads)


def test_enough_slots_are_the_whole_attention():
    layer, evicted, kept = layer_of(Slots(64)), drawn(20, keep=0.7), drawn(6, seed=5)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    out, lse = attention(queries(), kept.keys, kept.values, kept.mask)
    found = layer.read(state, queries(), out, lse, WIDTH**-0.5)
    pairs = [torch.cat([getattr(kept, n), getattr(evicted, n)], 2) for n in ("keys", "values", "mask")]
    assert torch.allclose(found, attention(queries(), *pairs)[0], atol=1e-5)


def test_slots_whose_keys_coincide_are_exact():
    evicted, kept = drawn(40), drawn(6, seed=5)
    names = torch.arange(40) % 4
    evicted.keys[:] = drawn(4, seed=7).keys[:, :, names]
    evicted.visual[:] = True
    evicted.scores[:] = torch.where(torch.arange(40) < 4, 9.0, 0.0)
    layer = layer_of(Slots(4))
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), part(evicted, slice(0, 15)))
    state = layer.absorb(state, part(evicted, slice(15, 40)))
    assert state["count"].sum(-1).eq(40).all()
    out, lse = attention(queries(), kept.keys, kept.values, kept.mask)
    found = layer.read(state, queries(), out, lse, WIDTH**-0.5)
    pairs = [torch.cat([getattr(kept, n), getattr(evicted, n)], 2) for n in ("keys", "values", "mask")]
    assert torch.allclose(found, attention(queries(), *pairs)[0], atol=1e-5)


def test_one_token_is_its_own_moment():
    evicted, kept = drawn(1), drawn(6, seed=5)
    for config in (Moment(), Moment("full")):
        layer = layer_of(config)
        state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
        out, lse = attention(queries(), kept.keys, kept.values, kept.mask)
        found = layer.read(state, queries(), out, lse, WIDTH**-0.5)
        pairs = [torch.cat([getattr(kept, n), getattr(evicted, n)], 2) for n in ("keys", "values", "mask")]
        assert torch.allclose(found, attention(queries(), *pairs)[0], atol=1e-5)


def test_covariances_are_those_of_everything_absorbed():
    layer, evicted = layer_of(Moment("full")), drawn(30)
    state = layer.empty(BATCH, torch.device("cpu"))
    for start in (0, 7, 8):
        state = layer.absorb(state, part(evicted, slice(start, {0: 7, 7: 8, 8: 30}[start])))
    keys, values = evicted.keys[1, 0], evicted.values[1, 0]
    centred = keys - keys.mean(0)
    assert torch.allclose(state["keys_keys"][1, 0], centred.T @ centred / 30, atol=1e-5)
    assert torch.allclose(state["values_keys"][1, 0], (values - values.mean(0)).T @ centred / 30, atol=1e-5)


def test_joint_is_exact_for_keys_of_a_finite_set(monkeypatch):
    """One-hot features of the key, exp(logit) of the query: then `phi_q . phi_k` is the softmax's own weight."""
    words = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))
    evicted, kept = drawn(30, keep=0.9), drawn(6, seed=5)
    evicted.keys[:] = words[torch.arange(30) % 6]
    layer = layer_of(Linear(features=6, text_decay="none"))
    layer.of_key.forward = lambda k: (k[..., None, :] == words).all(-1).float()
    layer.of_query.forward = lambda q: (WIDTH**-0.5 * q @ words.T).exp()
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    out, lse = attention(queries(), kept.keys, kept.values, kept.mask)
    found = layer.read(state, queries(), out, lse, WIDTH**-0.5)
    pairs = [torch.cat([getattr(kept, n), getattr(evicted, n)], 2) for n in ("keys", "values", "mask")]
    assert torch.allclose(found, attention(queries(), *pairs)[0], atol=1e-5)


def test_the_transition_equals_a_loop():
    layer, evicted = layer_of(Linear(vision_decay="step")), drawn(15, keep=0.7)
    with torch.no_grad():
        layer.weight_attention.fill_(0.7)
        layer.step_bias.fill_(-6.0)
        state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
        eta, phi = layer.log_eta(evicted.entropy).exp(), layer.of_key(evicted.keys)
        weight = torch.nn.functional.softplus(0.7 * evicted.attention + layer.weight_bias)
        for b in range(BATCH):
            for h in range(HEADS):
                total, norm = torch.zeros(2, 16, WIDTH), torch.zeros(2, 16)
                for i in torch.nonzero(evicted.mask[b, h]).flatten().tolist():
                    bank = 0 if evicted.visual[b, h, i] else 1
                    step = weight[b, h, i] * phi[b, h, i]
                    total[bank] = eta[b, h, i] * total[bank] + step[:, None] * evicted.values[b, h, i]
                    norm[bank] = eta[b, h, i] * norm[bank] + step
                assert torch.allclose(state["sum"][b, h], total, atol=1e-5)
                assert torch.allclose(state["norm"][b, h], norm, atol=1e-5)


def test_a_scale_of_nothing_is_plain_eviction():
    layer = layer_of(Linear())
    torch.nn.init.constant_(layer.log_scale, -60.0)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), drawn(20))
    out, lse = torch.randn(BATCH, 4, QUERIES, WIDTH), torch.randn(BATCH, 4, QUERIES)
    assert torch.allclose(layer.read(state, queries(), out, lse, 0.3), out, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Linear(feature_map="x"),
        lambda: Linear(features=3),
        lambda: Slots(0),
        lambda: Moment("diag"),
        lambda: Linear(readout="paper"),
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


def test_memories_are_named():
    assert {name: kind.name for name, kind in MEMORIES.items()} == {k: k for k in MEMORIES}
