"""Memories of evicted tokens: exact where they can be, empty where nothing left, the same whatever the order of calls."""

import math

import pytest
import torch

from retention.memory import MEMORIES, Evicted, RetentionMemory, state_bytes
from retention.memory.linear import Linear
from retention.memory.moment import COVARIANCES, Moment
from retention.memory.slots import Slots
from retention.types import ModelShape

SHAPE = ModelShape("llama", (0, 1), 4, 2, 8, 32)
BATCH, HEADS, WIDTH, QUERIES = 2, 2, 8, 3
PAPER = {"transition": "paper", "feature_map": "identity", "readout": "paper"}
LINEAR = {
    "default": Linear(),
    "hedgehog": Linear(feature_map="hedgehog"),
    "elu1": Linear(feature_map="elu1"),
    "gated": Linear(readout="gated"),
    "step": Linear(vision_decay="step"),
    "none": Linear(transition="none"),
    "on_top": Linear(readout="paper"),
    "paper": Linear(**PAPER, vision_decay="step", spatial=True),
    "delta": Linear(transition="delta", readout="gated", vision_decay="step"),
    "delta_on_top": Linear(transition="delta", readout="paper"),
    "spatial": Linear(spatial=True, gamma="learned"),
}
TRAINED = [pytest.param(config, id=name) for name, config in LINEAR.items()]
KINDS = [*TRAINED, Slots(4), Slots(64), *(Moment(x) for x in COVARIANCES)]
PARTS = [k for k in KINDS if not isinstance(k, Slots)]


def drawn(count, seed=0, keep=1.0):
    g = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, count)
    visual, images = torch.rand(shape, generator=g) < 0.5, torch.arange(count).expand(shape)[..., None] // 8
    places = torch.cat([images, torch.randint(0, 4, (*shape, 3), generator=g)], -1)
    evicted = Evicted(
        torch.randn(*shape, WIDTH, generator=g), torch.randn(*shape, WIDTH, generator=g), torch.rand(shape, generator=g) < keep,
        visual, torch.randn(shape, generator=g), torch.rand(shape, generator=g),
        torch.rand(shape, generator=g), WIDTH**-0.5, places.masked_fill(~visual[..., None], -1),
    )  # fmt: skip
    evicted.places[..., 1] = 0
    return evicted


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
    if getattr(config, "readout", "") == "paper":
        torch.nn.init.constant_(layer.gain, 0.3)
    return layer


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_an_empty_memory_changes_nothing(config):
    layer, out, lse = layer_of(config), torch.randn(BATCH, 4, QUERIES, WIDTH), torch.randn(BATCH, 4, QUERIES)
    empty = layer.empty(BATCH, out.device)
    assert torch.equal(layer.read(empty, queries(), out, lse, 0.3)[0], out)
    nobody = layer.absorb(empty, drawn(5, keep=0.0))
    assert torch.equal(layer.read(nobody, queries(), out, lse, 0.3)[0], out)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_what_stays_is_not_absorbed(config):
    layer, evicted = layer_of(config), drawn(12, keep=0.5)
    one = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    changed = drawn(12, keep=0.5)
    changed.keys[~changed.mask], changed.values[~changed.mask] = 50.0, -50.0
    other = layer.absorb(layer.empty(BATCH, torch.device("cpu")), changed)
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


@pytest.mark.parametrize("config", PARTS, ids=str)
def test_two_evictions_equal_one(config):
    layer, evicted = layer_of(config), drawn(16, keep=0.8)
    empty = layer.empty(BATCH, torch.device("cpu"))
    once = layer.absorb(empty, evicted)
    twice = layer.absorb(layer.absorb(empty, part(evicted, slice(0, 8))), part(evicted, slice(8, 16)))
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
    given = (20 * queries(), torch.randn(BATCH, 4, QUERIES, WIDTH), torch.randn(BATCH, 4, QUERIES))
    out, _ = layer.read(state, *given, 1.0)
    assert torch.isfinite(out).all()
    if config.trained and count:
        out.square().sum().backward()
        grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        assert grads
        assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize(
    "config", [Linear(vision_decay="step"), LINEAR["delta"], LINEAR["paper"], Moment("full")], ids=str
)
def test_a_hundred_thousand_tokens_leave_a_finite_state(config):
    layer, shape = layer_of(config), (1, HEADS, 100_000)
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, WIDTH, generator=g) for _ in range(2)]
    plain = [torch.rand(shape, generator=g) for _ in range(3)]
    evicted = Evicted(*given, torch.ones(shape, dtype=torch.bool), plain[0] < 0.5, plain[0], *plain[1:], 1.0)
    state = layer.absorb(layer.empty(1, torch.device("cpu")), evicted)
    out = layer.read(state, queries()[:1], torch.randn(1, 4, QUERIES, WIDTH), torch.randn(1, 4, QUERIES), 1.0)[0]
    assert torch.isfinite(out).all()
    if config.trained:
        out.square().sum().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("config", TRAINED)
def test_training_reaches_every_parameter(config):
    layer = layer_of(config)
    torch.nn.init.constant_(layer.log_scale, 0.3)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), drawn(40))
    doubt = torch.rand(BATCH, 4, QUERIES, generator=torch.Generator().manual_seed(1))
    out = layer.read(
        state, queries(), torch.zeros(BATCH, 4, QUERIES, WIDTH), torch.zeros(BATCH, 4, QUERIES), 1.0, doubt
    )[0]
    out.square().sum().backward()
    decays = "step" in (config.text_decay, config.vision_decay) and config.transition != "none"
    idle = set() if decays else {"step_entropy", "step_bias", "rate"}
    missed = {n for n, p in layer.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert missed <= idle


@pytest.mark.parametrize("config", TRAINED)
def test_heads_of_a_group_share_their_state(config):
    layer = layer_of(config)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), drawn(12))
    same = queries()[:, ::2].repeat_interleave(2, 1)
    out, lse = torch.ones(BATCH, 4, QUERIES, WIDTH), torch.zeros(BATCH, 4, QUERIES)
    found = layer.read(state, same, out, lse, 0.3)[0]
    assert torch.allclose(found[:, 0], found[:, 1])
    assert not torch.allclose(found[:, 0], found[:, 2])


@pytest.mark.parametrize("config", [LINEAR["none"], Linear(text_decay="none"), Moment("full")], ids=str)
def test_without_decay_the_order_does_not_matter(config):
    layer, evicted = layer_of(config), drawn(16, keep=0.8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    one, other = (layer.absorb(layer.empty(BATCH, torch.device("cpu")), x) for x in (evicted, part(evicted, order)))
    assert all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


def test_text_alone_leaves_the_vision_bank_empty():
    layer, evicted = layer_of(Linear()), drawn(16)
    evicted.visual[:] = False
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    assert state["count"][:, :, 0].eq(0).all()
    assert state["sum"][:, :, 0].eq(0).all()
    assert state["count"][:, :, 1].eq(16).all()


def test_text_joins_above_tau_alone():
    layer, evicted = layer_of(Linear(tau=0.5)), drawn(16)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    assert torch.equal(state["count"][:, :, 0], evicted.visual.sum(-1).float())
    assert torch.equal(state["count"][:, :, 1], (~evicted.visual & (evicted.entropy >= 0.5)).sum(-1).float())


def test_the_paper_s_readout_adds_to_the_output():
    layer, evicted = layer_of(LINEAR["on_top"]), drawn(20)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    out, lse = torch.randn(BATCH, 4, QUERIES, WIDTH), torch.zeros(BATCH, 4, QUERIES)
    doubt = torch.rand(BATCH, 4, QUERIES)
    found, total = layer.read(state, queries(), out, lse, 0.3, doubt)
    assert torch.equal(total, lse)
    with torch.no_grad():
        torch.nn.init.constant_(layer.doubt_weight, 2.0)
        found = layer.read(state, queries(), out, lse, 0.3, doubt)[0]
        for b, h, q in [(0, 0, 0), (1, 3, 2), (0, 2, 1)]:
            phi = layer.of_query(queries()[b, h, q].expand(1, HEADS, 1, WIDTH))[0, h // 2, 0]
            vision, text = (phi @ state["sum"][b, h // 2, i] for i in (0, 1))
            both = vision + torch.sigmoid(2 * doubt[b, h, q]) * text
            expected = out[b, h, q] + 0.3 * both / (both.square().mean() + 1e-6).sqrt()
            assert torch.allclose(found[b, h, q], expected, atol=1e-5)
        torch.nn.init.zeros_(layer.gain)
        assert torch.equal(layer.read(state, queries(), out, lse, 0.3, doubt)[0], out)


def test_the_gated_readout_mixes_by_one_weight_per_head():
    layer, evicted = layer_of(LINEAR["gated"]), drawn(20)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    out = torch.randn(BATCH, 4, QUERIES, WIDTH)
    found = [layer.read(state, queries(), out, torch.full((BATCH, 4, QUERIES), x), 0.3)[0] for x in (-9.0, 9.0)]
    assert torch.equal(*found)
    recalled = layer.estimate(state, queries().view(BATCH, HEADS, 2 * QUERIES, WIDTH), 0.3)[0].view(out.shape)
    s = torch.sigmoid(torch.tensor(-4.0))
    assert torch.allclose(found[0], (1 - s) * out + s * recalled, atol=1e-6)


def test_the_missing_mass_tells_the_full_output_from_what_is_kept():
    kept, gone = (drawn(n, seed=n) for n in (6, 20))
    pairs = [
        [getattr(x, n).double() if n != "mask" else x.mask for n in ("keys", "values", "mask")] for x in (kept, gone)
    ]
    both = [torch.cat(x, 2) for x in zip(*pairs, strict=True)]
    (o_r, lse_r), (o_e, lse_e), (full, lse) = (attention(queries().double(), *x) for x in (*pairs, both))
    mu = torch.sigmoid(lse_e - lse_r)[..., None]
    assert (full - ((1 - mu) * o_r + mu * o_e)).abs().max() < 1e-12
    assert (full - o_r - mu * (o_e - o_r)).abs().max() < 1e-12
    assert (torch.logaddexp(lse_r, lse_e) - lse).abs().max() < 1e-12


def test_enough_slots_are_the_whole_attention():
    layer, evicted, kept = layer_of(Slots(64)), drawn(20, keep=0.7), drawn(6, seed=5)
    state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
    out, lse = attention(queries(), kept.keys, kept.values, kept.mask)
    found = layer.read(state, queries(), out, lse, WIDTH**-0.5)[0]
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
    found = layer.read(state, queries(), out, lse, WIDTH**-0.5)[0]
    pairs = [torch.cat([getattr(kept, n), getattr(evicted, n)], 2) for n in ("keys", "values", "mask")]
    assert torch.allclose(found, attention(queries(), *pairs)[0], atol=1e-5)


def test_one_token_is_its_own_moment():
    evicted, kept = drawn(1), drawn(6, seed=5)
    for covariance in COVARIANCES:
        layer = layer_of(Moment(covariance))
        state = layer.absorb(layer.empty(BATCH, torch.device("cpu")), evicted)
        out, lse = attention(queries(), kept.keys, kept.values, kept.mask)
        found = layer.read(state, queries(), out, lse, WIDTH**-0.5)[0]
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
    for name in ("vk", "diag"):
        other, least = layer_of(Moment(name)), layer.empty(BATCH, torch.device("cpu"))
        least = other.empty(BATCH, torch.device("cpu"))
        for start, end in ((0, 7), (7, 8), (8, 30)):
            least = other.absorb(least, part(evicted, slice(start, end)))
        assert torch.allclose(least["values_keys"], state["values_keys"], atol=1e-5)
        if name == "diag":
            assert torch.allclose(least["keys_keys"], state["keys_keys"].diagonal(dim1=-1, dim2=-2), atol=1e-5)
        assert ("keys_keys" in least) == (name == "diag")


def test_joint_is_exact_for_keys_of_a_finite_set(monkeypatch):
    """One-hot features of the key, exp(logit) of the query: then `phi_q . phi_k` is the softmax's own weight."""
    words = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))
    evicted, kept = drawn(30, keep=0.9), drawn(6, seed=5)
    evicted.keys[:] = words[torch.arange(30) % 6]
    words = words.double()
    layer = layer_of(Linear(features=6, text_decay="none")).double()
    torch.nn.init.constant_(layer.weight_bias, math.log(math.e - 1))
    layer.of_key.forward = lambda k: (k[..., None, :] == words).all(-1).double()
    layer.of_query.forward = lambda q: (WIDTH**-0.5 * q @ words.T).exp()
    for x in (evicted, kept):
        x.keys, x.values, x.attention = x.keys.double(), x.values.double(), x.attention.double()
    empty = {k: v.double() for k, v in layer.empty(BATCH, torch.device("cpu")).items()}
    state, asked = layer.absorb(empty, evicted), queries().double()
    out, lse = attention(asked, kept.keys, kept.values, kept.mask)
    found, total = layer.read(state, asked, out, lse, WIDTH**-0.5)
    pairs = [torch.cat([getattr(kept, n), getattr(evicted, n)], 2) for n in ("keys", "values", "mask")]
    full, full_lse = attention(asked, *pairs)
    assert (found - full).abs().max() < 1e-10
    assert (total - full_lse).abs().max() < 1e-10


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
    assert torch.allclose(layer.read(state, queries(), out, lse, 0.3)[0], out, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Linear(feature_map="x"),
        lambda: Linear(features=3),
        lambda: Slots(0),
        lambda: Moment("x"),
        lambda: Linear(readout="x"),
        lambda: Linear(transition="delta"),
        lambda: Linear(transition="paper", feature_map="identity"),
        lambda: Linear(transition="paper", readout="paper"),
        lambda: Linear(feature_map="identity"),
        lambda: Linear(entropy="x"),
        lambda: Linear(gamma="x"),
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


def test_memories_are_named():
    assert {name: kind.name for name, kind in MEMORIES.items()} == {k: k for k in MEMORIES}


def test_how_much_stays_and_how_much_joins_is_as_written():
    evicted, sigma, soft = drawn(16), torch.sigmoid, torch.nn.functional.softplus
    h, a = evicted.entropy, evicted.attention
    evicted.places = None
    with torch.no_grad():
        step, paper, delta = (layer_of(LINEAR[name]) for name in ("step", "paper", "delta"))
        for layer, names in ((step, ("step_bias", "weight_attention")), (delta, ("step_bias", "weight_attention"))):
            for name, value in zip(names, (-6.0, 0.7), strict=True):
                getattr(layer, name).fill_(value)
        step.step_entropy.fill_(-4.0), paper.retain_bias.fill_(5.0), paper.retain_entropy.fill_(2.0)
        expected = (-soft(step.rate) * soft(soft(torch.tensor(-4.0)) * (1 - h) - 6)).exp()
        assert torch.allclose(step.log_eta(h).exp(), expected.clamp(min=0.99), atol=1e-6)
        assert torch.allclose(paper.log_eta(h).exp(), sigma(2 * h + 5).clamp(min=0.99), atol=1e-6)
        assert step.log_eta(h).diff(dim=-1).sign().equal(h.diff(dim=-1).sign()), "wide attention is retained"
        assert torch.allclose(step.weight(evicted), soft(0.7 * a + math.log(math.e - 1)), atol=1e-6)
        assert torch.allclose(delta.weight(evicted), sigma(0.7 * a + 4), atol=1e-6)
        assert torch.equal(paper.weight(evicted), a)
        paper.retain_bias.fill_(-5.0)
        assert torch.allclose(paper.log_eta(h).exp(), torch.full_like(h, 0.99)), "never less per token"
        fresh = layer_of(LINEAR["step"])
        assert torch.allclose(fresh.weight(evicted), torch.ones_like(a), atol=1e-6)
        assert 0.5**1.1 < (10_000 * fresh.log_eta(torch.ones(1, HEADS, 1))).exp().mean() < 0.5**0.9
