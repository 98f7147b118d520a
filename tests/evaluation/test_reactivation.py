"""What an eviction costs and a memory gives back, on a tiny model, against the same written out."""

import pytest
import torch

from retention.attach.capture import capture_attention
from retention.attach.simulate import decide_eviction
from retention.evaluation.reactivation import figures, look_after
from retention.memory import RetentionMemory
from retention.memory.slots import Slots
from retention.models.family import model_shape
from retention.policies import POLICIES
from tests.cache.helpers import gates_of, left_padded, model_of, tokens

IDS, MASK = left_padded(tokens(2, 24, seed=4), [24, 20])
SHARE = 0.25


@pytest.fixture(scope="module")
def passed():
    with torch.no_grad(), capture_attention(model_of(), gates_of()) as capture:
        model_of()(input_ids=IDS, attention_mask=MASK, use_cache=False)
    eviction = decide_eviction(capture, capture.context(), POLICIES["trim_kv"](), SHARE)
    return capture, eviction


def evidence_of(eviction):
    return torch.arange(IDS.shape[1]).expand(IDS.shape) % 3 == 0


def test_every_figure_is_what_it_says(passed):
    capture, eviction = passed
    evidence, number = evidence_of(eviction), 1
    look, layer = look_after(capture, eviction, None, evidence)[number], capture.layers[number]
    keys, values = (x.repeat_interleave(layer.query.shape[1] // 2, 1) for x in (layer.key, layer.value))
    logits, columns = layer.scaling * layer.query @ keys.transpose(-1, -2), torch.arange(IDS.shape[1])
    masses, errors, live, revived, counted = [], [], [], {}, 0
    for b in range(2):
        gone = eviction.context[b] & ~eviction.kept[number, b]
        counted += int(gone.sum())
        for t in range(eviction.first, IDS.shape[1]):
            if eviction.context[b, t]:
                continue
            seen = (columns <= t) & MASK[b].bool()
            full = logits[b, :, t].masked_fill(~seen, float("-inf")).softmax(-1)
            held = seen & ~gone.repeat_interleave(2, 0)
            part = logits[b, :, t].masked_fill(~held, float("-inf")).softmax(-1)
            masses.append((full * gone.repeat_interleave(2, 0)).sum(-1))
            errors.append(((part - full)[:, None] @ values[b])[:, 0].norm(dim=-1))
            alive = []
            for h in range(2):
                p, k = full[2 * h : 2 * h + 2].mean(0), int(eviction.kept[number, b, h].sum())
                position = int(MASK[b, : t + 1].sum()) - 1
                large = (p >= p.topk(k).values[-1]) | (p > 1 / (position + 1))
                alive += 2 * [bool((large & gone[h]).any())]
                for i in torch.nonzero(large & gone[h]).flatten().tolist():
                    since = position - int(eviction.context[b].sum()) + 1
                    revived.setdefault((b, h, i), since)
            live.append(torch.tensor(alive))
    assert torch.allclose(look.mass, torch.stack(masses), atol=1e-5)
    assert torch.allclose(look.bare, torch.stack(errors), atol=1e-5)
    assert torch.equal(look.error, look.bare)
    assert torch.equal(look.reactivating, torch.stack(live))
    assert int(look.evicted) == counted
    assert int(look.reactivated) == len(revived) > 0
    assert sorted(look.delay.tolist()) == sorted(map(float, revived.values()))
    assert int(look.answering) == sum(bool(evidence[b, i]) for b, _, i in revived)
    assert look.visual_mass.eq(0).all()


def test_perfect_recall_recovers_everything_and_knows_the_mass(passed):
    capture, eviction = passed
    memory = RetentionMemory(Slots(64), model_shape(model_of()))
    found = figures(look_after(capture, eviction, memory))
    assert found["recovered"] > 0.99
    assert found["recovered_reactivating"] > 0.99
    assert found["mass_slope"] == pytest.approx(1, abs=1e-3)
    assert found["mass_correlation"] == pytest.approx(1, abs=1e-3)
    assert found["error"] < 1e-3 < found["error_bare"]
    assert 0 < found["reactivated_mass"] <= found["missing_mass"] < found["missing_mass_p90"] < 1


def test_without_a_memory_nothing_is_recovered(passed):
    capture, eviction = passed
    looks = look_after(capture, eviction)
    found = figures(looks)
    assert found["recovered"] == 0
    assert found["mass_slope"] is None
    assert found["reactivated_evidence"] == 1
    parts = [figures(looks, [head]) for head in range(4)]
    assert found["missing_mass"] == pytest.approx(sum(x["missing_mass"] for x in parts) / 4)
    by_layer = [figures([look])["missing_mass"] for look in looks]
    assert found["missing_mass"] == pytest.approx(sum(by_layer) / len(by_layer))
