"""TGV-KV against its equations written out over full attention maps, and its ways to fail."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from retention import Budget, CacheConfig, evicting
from retention.ops import observe
from retention.ops.observe import naive_text_attention, text_attention, text_queries
from retention.policies.tgv_kv import TGVKV
from retention.types import KVState
from tests.cache.helpers import KV_HEADS, LAYERS, Conversation, left_padded, model_of, tokens
from tests.policies.test_matrix import winners
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

HEADS, GROUPS, WIDTH, SCALING = 2, 2, 4, 0.7
KINDS = {
    "one image": "ttvvvvttt",
    "interleaved": "tvvtvvvttvtt",
    "text first": "tttttvvvtt",
    "no text behind": "ttvvvv",
    "only text": "tttttt",
}


def marks(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Validity and visual marks of rows spelt t (text), v (visual), . (padding)."""
    rows = text.split()
    valid, visual = (torch.tensor([[c in wanted for c in row] for row in rows]) for wanted in ("tv", "v"))
    return valid, visual


def attention_of(valid: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    rows, count = valid.shape
    queries = torch.randn(rows, HEADS * GROUPS, count, WIDTH, generator=g)
    keys = torch.randn(rows, HEADS, count, WIDTH, generator=g)
    causal = torch.ones(count, count).tril().bool() & valid[:, None] & valid[:, :, None]
    return queries, keys, causal[:, None].expand(-1, HEADS, -1, -1)


def written_out(queries: Any, keys: Any, valid: Any, visual: Any) -> dict[str, Any]:
    """The equations with loops over one row of a batch, in float64: A is the mean over all query heads."""
    count = len(valid)
    real = [i for i in range(count) if valid[i]]
    a = torch.zeros(HEADS * GROUPS, count, count, dtype=torch.double)
    for h in range(HEADS * GROUPS):
        for r in real:
            seen = [i for i in real if i <= r]
            logits = torch.stack([SCALING * queries[h, r].double() @ keys[h // GROUPS, i].double() for i in seen])
            a[h, r, seen] = logits.softmax(0)
    a = a.mean(0)
    first = min((i for i in real if visual[i]), default=count)
    last = max((i for i in real if visual[i]), default=-1)
    text_rows = [i for i in real if not visual[i] and i > first]
    if not any(i > last for i in text_rows):
        text_rows = real[-32:]
    u = {i: sum(a[r, i] for r in text_rows if r >= i) / sum(r >= i for r in text_rows) for i in text_rows}
    u = {i: x / sum(u.values()) for i, x in u.items()}
    vision, plain, text = {}, {}, {}
    for j in real:
        behind = [i for i in text_rows if i > j]
        if visual[j]:
            vision[j] = float(sum(u[i] * a[i, j] for i in behind)) / max(len(behind), 1)
            plain[j] = float(sum(a[i, j] for i in behind))
        else:
            text[j] = float(sum(a[r, j] for r in text_rows if r >= j))
    counts = {j: sum(i > j for i in text_rows) for j in vision}
    return {"vision": vision, "plain": plain, "text": text, "counts": counts, "rows": text_rows}


def layer(valid: Any, visual: Any, seed: int = 0, number: int = 0) -> KVState:
    """A layer's state after one forward over everything, with what its collectors saw."""
    queries, keys, visible = attention_of(valid, seed)
    rows = text_queries(valid, visual, torch.zeros(len(valid), dtype=torch.bool), 32)
    found = text_attention(queries, keys, visible, SCALING, rows, visual)
    shape = (len(valid), HEADS, valid.shape[1])
    sums = observe.column_sums(queries, keys, visible, SCALING)
    return KVState(
        load=lambda: (keys, keys),
        positions=(valid.cumsum(1) - 1).clamp(min=0)[:, None].expand(shape),
        valid=valid[:, None].expand(shape),
        visual=visual[:, None].expand(shape),
        protected=torch.zeros(shape, dtype=torch.bool),
        seen=valid.sum(1),
        statistics=dict(zip(("text_sums", "text_relevance", "text_counts"), found, strict=True))
        | {"column_sums": sums},
        layer=number,
    )


@pytest.mark.parametrize("kind", [*KINDS.values(), "..tvvtvvttt tttvvvtvttt", "....tt tvtvtv"])
def test_scores_are_the_equations(kind):
    valid, visual = marks(kind)
    kv, (queries, keys, _) = layer(valid, visual), attention_of(valid)
    got, flat = TGVKV().score(kv), TGVKV(twr=False).score(kv)
    assert torch.equal(got[:, 0], got[:, 1]), "one ranking for all heads"
    for row in range(len(valid)):
        told = written_out(queries[row], keys[row], valid[row], visual[row])
        scale = len(told["rows"])  # u has mean 1 instead of sum 1
        for j, expected in told["vision"].items():
            assert float(got[row, 0, j]) == pytest.approx(scale * expected, abs=1e-5)
            assert float(flat[row, 0, j]) == pytest.approx(told["plain"][j] / max(told["counts"][j], 1), abs=1e-5)
        for j, expected in told["text"].items():
            assert float(got[row, 0, j]) == pytest.approx(expected, abs=1e-5)
        weight = sum(told["plain"].values())
        assert float(TGVKV().layer_weight(kv)[row]) == pytest.approx(weight, abs=1e-5)
        assert float(TGVKV(tvb=False).layer_weight(kv)[row]) == 1.0


@pytest.mark.parametrize("kind", ["ttvvvvttt", ".tvvtvvttt tttvvvtvtt"])
def test_one_ranking_gives_vision_the_attention_it_receives(kind):
    valid, visual = marks(kind)
    kv = layer(valid, visual)
    got, before = TGVKV(tpr=False).score(kv), TGVKV().score(kv)
    there = kv.visual & kv.valid
    assert torch.equal(got[~there], before[~there])
    sums, mass = (got * there).sum((1, 2)), (kv.statistics["text_sums"] * there).sum((1, 2))
    assert torch.allclose(sums, mass, atol=1e-5)
    for row in range(len(valid)):
        own = there[row, 0]
        assert torch.equal(got[row, 0][own].argsort(), before[row, 0][own].argsort())


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("kind", [*KINDS.values(), "..tvvtvvttt tttvvvtvttt"])
def test_blocks_of_text_rows_equal_the_full_map(monkeypatch, block, kind):
    monkeypatch.setattr(observe, "BLOCK", block)
    valid, visual = marks(kind)
    queries, keys, visible = attention_of(valid, seed=1)
    rows = text_queries(valid, visual, torch.zeros(len(valid), dtype=torch.bool), 3)
    call = (queries[:, :, 2:], keys, visible[:, :, 2:], SCALING, rows[:, 2:], visual[:, 2:])
    for got, expected in zip(text_attention(*call), naive_text_attention(*call), strict=True):
        torch.testing.assert_close(got, expected)


def test_which_queries_are_text_rows():
    valid, visual = marks("..tvvttvt ttttttttt tvvvvvvvv .......tt")
    before = torch.tensor([False, False, False, True])
    rows = text_queries(valid, visual, before, 2)
    names = ["".join("x" if x else "-" for x in row) for row in rows.tolist()]
    assert names == ["-----xx-x", "-------xx", "-------xx", "-------xx"]
    assert text_queries(*marks("ttt"), torch.tensor([True]), 1).all(), "a question about an image of an earlier turn"


def kept(kind: str, policy: TGVKV, budget: float, **changes: Any) -> torch.Tensor:
    valid, visual = marks(kind)
    layers = [layer(valid, visual, seed=n, number=n) for n in range(3)]
    masks = winners(layers, policy, CacheConfig(Budget(budget), **changes), torch.full((len(valid),), int(budget)))
    assert masks is not None
    return masks


def test_text_comes_before_vision_and_the_total_is_exact():
    kind = "ttvvvvvvvvttvvvvvvtttt"
    masks, visual = kept(kind, TGVKV(), 12.0), torch.tensor([c == "v" for c in kind])
    assert masks.sum((0, 3)).tolist() == [[36] * HEADS]
    assert (masks[:, :, 0] == masks[:, :, 1]).all()
    counts = masks.sum(-1)[:, 0, 0]
    assert counts.unique().numel() > 1, "layers differ in their attention to vision"
    for mask, count in zip(masks[:, 0, 0], counts.tolist(), strict=True):
        assert mask[[0, 1, 2, 3, -1]].all(), "the first four and the last one, images or not"
        assert mask[~visual].all() or count < 8 + 2
        assert bool(mask[4:][visual[4:]].any()) == (count > 8 + 2)


def test_text_that_exceeds_the_budget_discards_all_vision():
    """The method's failure case: the longer the text, the less vision stays, in the end none."""
    held = []
    for text in (4, 8, 16, 32):
        kind = "tttt" + "v" * 16 + "t" * text
        masks = kept(kind, TGVKV(tvb=False), 16.0)
        held.append(int(masks[..., 4:20].sum()))
        without = kept(kind, TGVKV(tvb=False, tpr=False), 16.0)
        assert without[..., 4:20].any()
    assert held == sorted(held, reverse=True)
    assert held[0] == 3 * HEADS * 8
    assert held[-2:] == [0, 0]


def test_budgets_follow_attention_from_text_to_vision():
    valid, visual = marks("ttttt" + "v" * 30 + "t" * 5)
    layers = [layer(valid, visual, number=n) for n in range(3)]
    for number, factor in enumerate((1.0, 2.0, 0.0)):
        sums = layers[number].statistics["text_sums"] * factor
        layers[number] = replace(layers[number], statistics=dict(layers[0].statistics) | {"text_sums": sums})
    budgets = torch.tensor([18])
    counts = winners(layers, TGVKV(), CacheConfig(Budget(18.0)), budgets).sum(-1)[:, 0, 0]
    assert counts.tolist() == [16, 33, 5], "the first four and the last one stay in a layer without any weight"
    counts = winners(layers, TGVKV(tvb=False), CacheConfig(Budget(18.0)), budgets).sum(-1)[:, 0, 0]
    assert counts.tolist() == [18, 18, 18]
    budgets = torch.tensor([24])
    counts = winners(layers, TGVKV(), CacheConfig(Budget(24.0)), budgets).sum(-1)[:, 0, 0]
    assert counts.tolist() == [27, 40, 5], "what a full layer cannot hold goes to the others"
    for policy in (TGVKV(redistribute=False), TGVKV(mode="as_published")):
        counts = winners(layers, policy, CacheConfig(Budget(24.0)), budgets).sum(-1)[:, 0, 0]
        assert counts.tolist() == [22, 40, 5], "or is lost"


def test_protection_of_the_user_comes_before_the_methods_own():
    kind = "vvvvvvvvvvtttttt"
    valid, visual = marks(kind)
    layers = [layer(valid, visual, number=n) for n in range(2)]
    for state in layers:
        state.protected = (state.positions == 6).clone()
    masks = winners(layers, TGVKV(tvb=False), CacheConfig(Budget(3.0), recent_size=1), torch.tensor([3]))
    assert masks[..., [6, 15]].all()
    assert (masks[..., :4].sum(-1) == 1).all()


def test_as_published_ranks_text_by_all_queries_and_divides_nothing():
    valid, visual = marks("ttvvtvvttt")
    kv = layer(valid, visual)
    score, known = TGVKV(mode="as_published").score(kv), kv.statistics
    text = ~visual[0]
    assert torch.allclose(score[0, 0][text], known["column_sums"].mean(1)[0][text], atol=1e-6)
    assert torch.allclose(score[0, 0][~text], known["text_relevance"].mean(1)[0][~text], atol=1e-6)
    assert TGVKV(mode="as_published").collectors == ("text_rows", "column_sums")
    assert TGVKV().collectors == ("text_rows",)


@pytest.mark.parametrize("values", [{"mode": "paper"}, {"sinks": -1}, {"decode": "shrink"}])
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValueError, match=f"tgvkv.{next(iter(values))}"):
        TGVKV(**values)


# --- in a real model ----------------------------------------------------------------------------------------


def prompt(row: str, seed: int) -> torch.Tensor:
    """Ids of a prompt spelt t (text) and I (an image)."""
    ids = tokens(1, len(row), seed=seed)[0].tolist()
    return torch.tensor([x for c, one in zip(row, ids, strict=True) for x in ([IMAGE_TOKEN] * IMAGE_TOKENS if c == "I" else [one])])  # fmt: skip


def batch(*rows: str) -> dict[str, torch.Tensor]:
    """Left-padded prompts with their images."""
    parts = [prompt(row, seed) for seed, row in enumerate(rows)]
    longest = max(map(len, parts))
    ids = torch.stack([torch.cat([torch.full((longest - len(x),), 5), x]) for x in parts])
    _, mask = left_padded(ids, [len(x) for x in parts])
    g = torch.Generator().manual_seed(len(rows[0]))
    images = [torch.randn(row.count("I"), 3, IMAGE_SIZE, IMAGE_SIZE, generator=g) for row in rows]
    return {"ids": ids, "mask": mask, "pixel_values": torch.cat(images)}


PROMPTS = ("ttIttttItttt", "tItttttttttttt")


@pytest.mark.parametrize("mode", ["generalised", "as_published"])
def test_a_padded_batch_equals_its_rows_alone(mode):
    together, policy = batch(*PROMPTS), TGVKV(mode=mode, sinks=1)
    question = tokens(2, 3, seed=9)
    with evicting(model_of("llava"), policy, CacheConfig(Budget(7.0))) as cache:
        told = Conversation(model_of("llava"), cache)
        told.feed(**together)
        table = cache.kept_table()
        told.feed(question)
        later = cache.kept_table()
    images = torch.tensor([row.count("I") for row in PROMPTS]).cumsum(0).tolist()
    for row, end in enumerate(images):
        real = together["mask"][row].bool()
        pixels = together["pixel_values"][end - PROMPTS[row].count("I") : end]
        with evicting(model_of("llava"), policy, CacheConfig(Budget(7.0))) as cache:
            told = Conversation(model_of("llava"), cache)
            told.feed(together["ids"][row : row + 1, real], pixel_values=pixels)
            count = int(real.sum())
            assert torch.equal(cache.kept_table()[:, 0], table[:, row, :, :count])
            if mode == "generalised":
                assert int(cache.kept().sum()) == 7 * LAYERS * KV_HEADS
            told.feed(question[row : row + 1])
            assert torch.equal(cache.kept_table()[:, 0], later[:, row, :, : count + 3])


@pytest.mark.parametrize("chunk", [{"prefill_chunk": 5}, {"chunk_by_image": True}])
def test_chunks_keep_the_budget_and_count_the_rows_of_all_chunks(chunk):
    seen = []

    class Watching(TGVKV):
        def score(self, kv):
            seen.append({name: x.clone() for name, x in kv.statistics.items()})
            return super().score(kv)

    one = batch(PROMPTS[0])
    with evicting(model_of("llava"), Watching(sinks=1), CacheConfig(Budget(7.0), **chunk)) as cache:
        told = Conversation(model_of("llava"), cache)
        told.feed(**one)
        assert (cache.kept().sum(0) == 7 * LAYERS).all()
    first = seen[-LAYERS]["text_counts"]
    assert float(first.max()) > float(first[..., -1].max()), "rows of several chunks are behind the oldest keys"
