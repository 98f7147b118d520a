"""What collectors see in a real model: rows that roll, expected queries, output norms, density of text rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from retention import POLICIES, Budget, CacheConfig, evicting
from tests.cache.helpers import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    Conversation,
    Oracle,
    left_padded,
    model_of,
    policy_with,
    small,
    tokens,
)
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

PROMPT = left_padded(tokens(2, 20, seed=1), [20, 13])
ANSWERS = tokens(2, 12, seed=3)
AMPLE = CacheConfig(Budget(60.0))


def grouped(weights: Tensor) -> Tensor:
    return weights.unflatten(1, (KV_HEADS, -1))


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_rows_roll_while_decoding_and_follow_their_entries(scope):
    oracle, window = Oracle(), 4
    config = CacheConfig(Budget(6.0), allocator=scope, evict_every=3)
    score = policy_with(lambda kv: kv.statistics["window_rows"].sum(2), collector="window_rows", observed_rows=window)
    (ids, mask), rows = PROMPT, []
    with evicting(model_of(), score, config) as cache:
        told = Conversation(model_of(), cache)
        for step in range(9):
            told.feed(ids, mask), oracle.feed(ids, mask)
            rows.append([grouped(x).mean(2) * mask[:, None, :, None] for x in oracle.weights.values()])
            if step:
                for number, layer in enumerate(cache.evicting_layers):
                    kv = layer.state()
                    parts = [part[number] for part in rows]
                    longest = parts[-1].shape[-1]
                    every = torch.cat([torch.nn.functional.pad(x, (0, longest - x.shape[-1])) for x in parts], 2)
                    columns = kv.positions + (20 - PROMPT[1].sum(1))[:, None, None]
                    expected = every[:, :, -window:].gather(-1, columns[:, :, None].expand(-1, -1, window, -1))
                    found = kv.statistics["window_rows"]
                    assert found.shape[2] == window
                    assert ((found - expected) * kv.valid[:, :, None]).abs().max() < 1e-5
            if step % 3 == 0:
                oracle.drop(cache.kept_table(), packed=False)
            ids, mask = ANSWERS[:, step, None], torch.ones(2, 1, dtype=torch.long)


@pytest.mark.parametrize("name", ["mada", "r_kv", "snapkv"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_a_prompt_leave_the_rows_of_the_whole(name, chunk):
    found = []
    for size in (None, chunk):
        with evicting(model_of(), small(name), CacheConfig(Budget(60.0), prefill_chunk=size)) as cache:
            told = Conversation(model_of(), cache)
            told.feed(*PROMPT), told.feed(*PROMPT)
            found.append([x for layer in cache.evicting_layers for x in layer.observed.values()])
    assert all(a.shape == b.shape and (a - b).abs().max() < 1e-5 for a, b in zip(*found, strict=True))


def test_rows_leave_with_the_last_chunk_unless_decoding_goes_on_with_them():
    for every in (None, 2):
        config = CacheConfig(Budget(6.0), prefill_chunk=8, evict_every=every)
        with evicting(model_of(), small("mada"), config) as cache:
            Conversation(model_of(), cache).feed(*PROMPT)
            assert all(bool(layer.observed) == (every is not None) for layer in cache.evicting_layers)


def caught_queries(family: str, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Queries before their rotation, [batch, heads, tokens, head_dim] per layer."""
    model, found = model_of(family), []
    name = "q_norm" if family == "qwen3" else "q_proj"

    def keep(_: Any, __: Any, out: Tensor) -> None:
        found.append(out.view(*ids.shape, -1, HEAD_DIM).transpose(1, 2))

    hooks = [getattr(x.self_attn, name).register_forward_hook(keep) for x in model.get_decoder().layers]
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_expected_logits_are_those_of_queries_caught_before_their_rotation(family):
    model, (ids, mask) = model_of(family), PROMPT
    with evicting(model, POLICIES["expected_attention"](), AMPLE) as cache:
        Conversation(model, cache).feed(ids, mask)
        states = [layer.state() for layer in cache.evicting_layers]
    for layer, queries in enumerate(caught_queries(family, ids, mask)):
        for row, length in enumerate(mask.sum(1).tolist()):
            ahead = torch.arange(length, length + 512)[None]
            cos, sin = model.get_decoder().rotary_emb(torch.zeros(1), ahead)
            half = HEAD_DIM // 2
            eye = torch.eye(HEAD_DIM)
            flipped = torch.cat([-eye[half:], eye[:half]])  # rotate_half as a matrix
            turn = torch.diag(cos[0].mean(0)) + torch.diag(sin[0].mean(0)) @ flipped
            for head in range(4):
                real = queries[row, head, -length + 4 :].double()
                mu = turn.double() @ real.mean(0)
                sigma = turn.double() @ real.T.cov(correction=0) @ turn.double().T
                kv = states[layer]
                keys = kv.keys[row, head // 2].double()
                first, second = (
                    kv.statistics[n][row, head // 2, head % 2] for n in ("expected_mean", "expected_spread")
                )
                seen = kv.valid[row, 0]
                assert torch.allclose((keys @ mu / 4)[seen].float(), first[seen], atol=1e-4)
                spread = ((keys @ sigma) * keys).sum(-1) / (2 * HEAD_DIM)
                assert torch.allclose(spread[seen].float(), second[seen], atol=1e-4)


def test_output_norms_are_those_behind_the_projection():
    with evicting(model_of(), small("criticalkv"), AMPLE) as cache:
        Conversation(model_of(), cache).feed(*PROMPT)
        for number, layer in enumerate(cache.evicting_layers):
            kv, project = layer.state(), model_of().get_decoder().layers[number].self_attn.o_proj
            expected = torch.zeros(kv.valid.shape)
            for head in range(4):
                alone = torch.zeros(*kv.valid.shape[::2], 4, HEAD_DIM)
                alone[:, :, head] = kv.values[:, head // 2]
                expected[:, head // 2] += project(alone.flatten(2)).abs().sum(-1) / 2
            assert torch.allclose(kv.statistics["output_norm"], expected, rtol=1e-4)


def attention_of(model: Any, ids: Tensor, **extra: Any) -> list[Tensor]:
    import copy

    model = copy.deepcopy(model)
    model.set_attn_implementation({"text_config": "eager"} if hasattr(model.config, "text_config") else "eager")
    with torch.no_grad():
        return model(ids, output_attentions=True, use_cache=False, **extra).attentions


def _assert_density(kv: Any, rows: Tensor, text: Tensor) -> None:
    dense = (rows >= 0.01 * rows.amax(-1, keepdim=True)) & (rows > 0)
    assert torch.allclose(kv.statistics["text_dense"], dense.float().mean(2).sum(2))
    seen = (torch.arange(24) <= torch.arange(24)[text, None]).sum(0).float()
    assert torch.equal(kv.statistics["text_seen"], seen.expand(1, KV_HEADS, 24))
    assert torch.allclose(kv.statistics["text_sums"], rows.mean(2).sum(2), atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 7])
def test_density_moments_and_entropies_equal_eager_attention(chunk):
    model, ids = model_of("llava"), tokens(1, 24, seed=4)
    for start in (3, 11):
        ids[:, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    config, extra = CacheConfig(Budget(60.0), prefill_chunk=chunk), ("window_moments", "modality_entropy")
    with evicting(model, POLICIES["vl_cache"](), config, extra_collectors=extra) as cache:
        Conversation(model, cache).feed(ids, pixel_values=pixels)
        states = [layer.state() for layer in cache.evicting_layers]
    text = (torch.arange(24) >= 3 + IMAGE_TOKENS) & (ids[0] != IMAGE_TOKEN)
    for kv, weights in zip(states, attention_of(model, ids, pixel_values=pixels), strict=True):
        if chunk is None:
            _assert_density(kv, grouped(weights)[:, :, :, text], text)
        received = torch.zeros(1, KV_HEADS, 24)
        for kind in (ids[0] == IMAGE_TOKEN, ids[0] != IMAGE_TOKEN):
            other = grouped(weights)[:, :, :, kind] * ~kind
            other = other / other.sum(-1, keepdim=True).clamp(min=1e-30)
            received += -(other * other.clamp(min=1e-30).log()).sum(3).mean(2)
        assert torch.allclose(kv.statistics["modality_entropy"], received, atol=1e-4)
        last = grouped(weights)[:, :, :, -(3 if chunk else 24) :]
        found = [kv.statistics[name] for name in ("row_mean", "row_variance", "row_entropy")]
        entropy = -(last * last.clamp(min=1e-30).log()).sum(3)
        expected = (last.mean(3), last.var(3, correction=0), entropy)
        for got, wanted in zip(found, expected, strict=True):
            assert torch.allclose(got, wanted.mean(2), atol=1e-5)
    assert len(states) == LAYERS
