"""TGV-KV while decoding as published, against its rule written out, and as_published against the full cache it must not be."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.policies.tgv_kv import TGVKV
from tests.cache.helpers import KV_HEADS, LAYERS, Conversation, Oracle, gap, model_of, tokens
from tests.policies.test_tgv_kv import batch
from tests.tiny import IMAGE_TOKEN

PROMPTS = ("ttIttttItttt", "tItttttttttttt")
BUDGET = 9.0


def step_by_hand(held: list[int], attention: list[float], allowed: int, spared: set[int]) -> list[int]:
    """What one layer holds after a step: attention is of the newest query, mean over heads, by position."""
    free = [p for p in held if p not in spared]
    if len(held) <= allowed or not free:
        return held
    least = min(free, key=lambda p: (attention[p], p))
    return [p for p in held if p != least]


def spared(ids: Any, mask: Any, sinks: int = 4) -> list[set[int]]:
    """The first tokens, and the prompt's text behind its last image, by row."""
    found = []
    for row, real in zip(ids.tolist(), mask.bool().tolist(), strict=True):
        own = [token for token, there in zip(row, real, strict=True) if there]
        last = max(i for i, token in enumerate(own) if token == IMAGE_TOKEN)
        found.append({*range(sinks), *range(last + 1, len(own))})
    return found


def told(cache: Any, inputs: dict[str, Any]) -> Conversation:
    conversation = Conversation(model_of("llava"), cache)
    conversation.feed(**inputs)
    return conversation


@pytest.mark.parametrize("mode", ["generalised", "as_published"])
@pytest.mark.parametrize("tvb", [True, False])
def test_every_step_is_the_rule_written_out(mode, tvb):
    inputs, oracle = batch(*PROMPTS), Oracle("llava")
    lengths = inputs["mask"].sum(1).tolist()
    fixed = spared(inputs["ids"], inputs["mask"])
    policy, dropped = TGVKV(mode=mode, tvb=tvb, decode="published"), 0
    with evicting(model_of("llava"), policy, CacheConfig(Budget(BUDGET))) as cache:
        conversation = told(cache, inputs)
        oracle.feed(**inputs)
        after = cache.kept()
        held = cache.kept_table()
        oracle.drop(held, packed=False)
        for step in range(24):
            ids = tokens(2, 1, seed=100 + step)
            assert gap(conversation.feed(ids), oracle.feed(ids)) < 1e-4
            table = cache.kept_table()
            for layer in range(LAYERS):
                weights = oracle.weights[layer].mean(1)[:, 0]
                for row in range(2):
                    seen = lengths[row] + step + 1
                    real = torch.nonzero(oracle.mask[row]).flatten()
                    attention = [float(weights[row, column]) for column in real]
                    before = [p for p in range(seen) if p == seen - 1 or bool(held[layer, row, 0, p])]
                    allowed = int(after[layer, row, 0]) * seen // lengths[row]
                    expected = step_by_hand(before, attention, allowed, fixed[row])
                    dropped += len(before) - len(expected)
                    for head in range(KV_HEADS):
                        assert torch.nonzero(table[layer, row, head]).flatten().tolist() == expected
            oracle.drop(table, packed=False)
            held = table
    assert dropped > 20, "something left"


def test_budgets_grow_in_proportion_and_at_most_one_entry_leaves():
    inputs = batch(PROMPTS[0])
    length = inputs["ids"].shape[1]
    with evicting(model_of("llava"), TGVKV(decode="published"), CacheConfig(Budget(12.0))) as cache:
        conversation = told(cache, inputs)
        counts = after = cache.kept()
        for step in range(12):
            conversation.feed(tokens(1, 1, seed=step))
            now = cache.kept()
            assert ((now - counts == 1) | (now == counts)).all(), "one came, at most one left"
            assert (now <= (after * (length + step + 1) // length).clamp(min=1)).all()
            counts = now
    with evicting(model_of("llava"), TGVKV(), CacheConfig(Budget(12.0))) as cache:
        conversation = told(cache, inputs)
        conversation.feed(tokens(1, 1))
        assert (cache.kept() == after + 1).all(), "decode=grow keeps what is decoded"


def test_a_prompt_that_fits_keeps_everything_and_a_next_prompt_starts_anew():
    inputs = batch(PROMPTS[0])
    with evicting(model_of("llava"), TGVKV(decode="published"), CacheConfig(Budget(60.0))) as cache:
        conversation = told(cache, inputs)
        for step in range(3):
            conversation.feed(tokens(1, 1, seed=step))
        assert (cache.kept() == inputs["ids"].shape[1] + 3).all()
    with evicting(model_of("llava"), TGVKV(decode="published"), CacheConfig(Budget(12.0))) as cache:
        conversation = told(cache, inputs)
        for step in range(6):
            conversation.feed(tokens(1, 1, seed=step))
        conversation.feed(tokens(1, 5))
        assert int(cache.kept().sum()) == 12 * LAYERS * KV_HEADS
        again = cache.kept()
        conversation.feed(tokens(1, 1))
        assert (cache.kept() - again <= 1).all()


@pytest.mark.parametrize("when", ["before", "amid"])
def test_a_saved_conversation_and_beams_go_on_alike(when, tmp_path):
    inputs, policy, config = batch(*PROMPTS), TGVKV(decode="published"), CacheConfig(Budget(BUDGET))
    with evicting(model_of("llava"), policy, config) as cache:
        conversation = told(cache, inputs)
        for step in range(0 if when == "before" else 3):
            conversation.feed(tokens(2, 1, seed=step))
        cache.save(tmp_path / "saved")
        mask, fork = conversation.mask, cache.fork()
        fork.reorder_cache(torch.tensor([1, 0]))
        other = Conversation(model_of("llava"), fork)
        other.mask = mask[[1, 0]]
        logits, swapped = [], []
        for step in range(8):
            ids = tokens(2, 1, seed=50 + step)
            logits.append(conversation.feed(ids))
            swapped.append(other.feed(ids[[1, 0]]))
        table = cache.kept_table()
        assert torch.equal(fork.kept_table()[:, [1, 0]], table)
    with evicting(model_of("llava"), policy, config) as cache:
        cache.restore(tmp_path / "saved")
        conversation = Conversation(model_of("llava"), cache)
        conversation.mask = mask
        for step in range(8):
            assert gap(conversation.feed(tokens(2, 1, seed=50 + step)), logits[step]) < 1e-6
        assert torch.equal(cache.kept_table(), table)
    assert all(gap(a[[1, 0]], b) < 1e-5 for a, b in zip(logits, swapped, strict=True))


def test_what_a_user_protects_stays():
    inputs = batch(PROMPTS[0])
    mine = torch.zeros_like(inputs["mask"], dtype=torch.bool)
    mine[0, 5:8] = True
    with evicting(model_of("llava"), TGVKV(decode="published"), CacheConfig(Budget(BUDGET), recent_size=2)) as cache:
        cache.protect(mine)
        conversation = told(cache, inputs)
        for step in range(20):
            conversation.feed(tokens(1, 1, seed=step))
            table = cache.kept_table()
            assert table[..., 5:8].all()
            assert table[..., -2:].all()


def test_intervals_are_refused():
    with (
        pytest.raises(ValueError, match=r"TGVKV drops at most one entry.*evict_every=3.*null"),
        evicting(model_of("llava"), TGVKV(decode="published"), CacheConfig(Budget(9.0), evict_every=3)),
    ):
        pass


# --- as_published must evict, or fail: its public implementation runs the full cache where it fails ------------


@pytest.mark.parametrize("decode", ["grow", "published"])
@pytest.mark.parametrize("rows", [("ttIttttt",), ("ttIttttItttt",), ("tttttIIII",), ("t" * 24,), PROMPTS], ids=str)
def test_as_published_never_holds_the_full_cache(rows, decode):
    """One image, several, none behind, none at all, and a padded batch, through `generate()`."""
    ids = tokens(1, 24)
    inputs = batch(*rows) if any("I" in row for row in rows) else {"ids": ids, "mask": torch.ones_like(ids)}
    policy, steps = TGVKV(mode="as_published", decode=decode), 6
    given = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    given |= {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    seen = inputs["mask"].sum(1)
    with evicting(model_of("llava"), policy, CacheConfig(Budget(8.0))) as cache:
        model_of("llava").generate(**given, past_key_values=cache, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)  # fmt: skip
        counts = cache.kept()
        new = steps - 1
        assert cache.seen().tolist() == (seen + new).tolist()
        assert (counts.sum((0, 2)) <= (8 + new) * LAYERS * KV_HEADS).all()
        assert (counts.sum((0, 2)) < (seen + new) * LAYERS * KV_HEADS).all()
        bytes_ = cache.bytes()
    with evicting(model_of("llava"), TGVKV(mode="as_published", decode=decode), CacheConfig(Budget(200.0))) as full:
        model_of("llava").generate(**given, past_key_values=full, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)  # fmt: skip
        assert full.kept().sum() == int((seen + new).sum()) * LAYERS * KV_HEADS
        assert bytes_.logical_total < full.bytes().logical_total


@pytest.mark.parametrize("part", ["score", "layer_weight", "step_score"])
def test_as_published_fails_aloud(part):
    class Broken(TGVKV):
        pass

    def broken(self: Any, kv: Any) -> Any:
        raise RuntimeError("as broken as can be")

    setattr(Broken, part, broken)

    def converse() -> None:
        policy, config = Broken(mode="as_published", decode="published"), CacheConfig(Budget(8.0))
        with evicting(model_of("llava"), policy, config) as cache:
            conversation = told(cache, batch(PROMPTS[0]))
            for _ in range(4):
                conversation.feed(tokens(1, 1))

    with pytest.raises(RuntimeError, match="as broken as can be"):
        converse()


def test_the_rule_without_a_model():
    """An allowance that is met, one that is exceeded, and heads where nothing may leave."""
    from retention.cache.decide import drop_one
    from tests.policies.test_matrix import HEADS, KEYS, ROWS, state

    kv = state()
    rows = kv.statistics["window_rows"].clone()
    rows[..., 7] = 0.0
    allowance = torch.tensor([[KEYS, KEYS - 1, 3], [KEYS - 1, KEYS, KEYS + 5]])
    suffix = torch.zeros(ROWS, HEADS, KEYS, dtype=torch.bool)
    kv = replace(kv, statistics={"window_rows": rows}, allowance=allowance, suffix=suffix)
    rule = TGVKV(decode="published").step_score
    mask = drop_one([kv], rule, CacheConfig())[0]
    assert (~mask).sum(-1).tolist() == [[0, 1, 1], [1, 0, 0]]
    assert (torch.nonzero(~mask)[:, 2] == 7).all()
    assert drop_one([replace(kv, suffix=~suffix)], rule, CacheConfig()).all()
