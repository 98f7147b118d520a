"""Tiny models, conversations and an oracle that never evicts: the full cache, hidden and rotated by hand."""

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from retention.gates import RetentionGates
from retention.gates.trim import Trim
from retention.policies import POLICIES, Policy
from retention.policies.collect import COLLECTORS
from retention.policies.window import WindowPolicy
from retention.policies.wrapper import Wrapper
from tests.tiny import IMAGE_TOKEN, VOCAB, tiny_llama, tiny_llava, tiny_qwen3

FACTORIES = {"llama": tiny_llama, "qwen3": tiny_qwen3, "llava": tiny_llava}
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 16
QUOTA = [[1.0, 3.0], [2.0, 2.0], [4.0, 1.0]]
STD = 0.15
"""Wide initial weights, so that attention is far from uniform."""


def model_of(family: str = "llama") -> Any:
    """The one model of a family; named or by default the same object."""
    return _built(family)


@lru_cache
def _built(family: str) -> Any:
    return FACTORIES[family](initializer_range=STD)


@lru_cache
def gates_of(family: str = "llama") -> RetentionGates:
    """Random gates whose half-lives spread over the lengths used here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        gates = RetentionGates.for_model(Trim(gate_hidden=8, init_half_life=10.0), model_of(family))
        for name, parameter in gates.named_parameters():
            if "offset" not in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return gates.eval().requires_grad_(False)


SMALL: dict[str, dict[str, int]] = {
    "mada": {"proxies": 4},
    "r_kv": {"window_size": 4, "kernel_size": 3},
    "lagkv": {"lag_size": 3, "sinks": 2},
    "retentive": {"sinks": 1, "window_size": 3},
    "kvzip": {"chunk_size": 9, "overlap": 3, "sinks": 2},
}


def small(name: str) -> Policy:
    """A policy with windows that fit prompts of twenty tokens."""
    kind = POLICIES[name]
    if name in SMALL:
        return kind(**SMALL[name])
    if issubclass(kind, Wrapper):
        return kind().over(small(kind.base))
    return kind(window_size=4, kernel_size=3) if issubclass(kind, WindowPolicy) else kind()


EVERY = sorted(name for name, policy in POLICIES.items() if policy.allocator != "quota")
"""Policies that need no table of shares (tests/policies/test_wrappers.py has that one)."""
EVICTING = [name for name in EVERY if POLICIES[name].evicts]
DECODING = sorted(name for name in EVICTING if POLICIES[name].evicts_while_decoding)
COLLECTED = tuple(sorted(set(COLLECTORS) - {"none", "keys_values"}))
LASTING = {"gate"} | {name for name, collector in COLLECTORS.items() if collector is not None and collector.accumulates}
ONE_FORWARD = {"window_moments", "query_moments"}
"""Collectors that sum up the newest chunk of a prompt alone."""
ANY_TIME = [name for name in DECODING if {*POLICIES[name]().collectors} <= {"none", "keys_values", *LASTING}]
"""Policies whose statistics survive an eviction, so that they may be asked to evict at any time."""


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    """Random ids without padding or image placeholders."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, min(VOCAB, IMAGE_TOKEN), (rows, count), generator=generator)


def left_padded(ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Mark everything but the last `lengths` tokens of each row as padding."""
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


class Conversation:
    """Feeds tokens with explicit positions and padding mask to any cache."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.mask: Tensor | None = None

    @torch.no_grad()
    def feed(self, ids: Tensor, mask: Tensor | None = None, **extra: Any) -> Tensor:
        """Logits of all new tokens."""
        mask = torch.ones_like(ids) if mask is None else mask
        past = mask[:, :0] if self.mask is None else self.mask
        self.mask = torch.cat([past, mask], 1)
        positions = (past.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0)
        return self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        ).logits


class Oracle:
    """The truth for any eviction: nothing is dropped, dropped entries are hidden, rotation happens at attention.

    The model runs with every position at 0, where its rotation is the identity; queries and keys are rotated
    by transformers' own embedding in the attention function, each key at the place it should have in its head.
    """

    current: "Oracle"

    def __init__(self, family: str = "llama") -> None:
        from transformers import DynamicCache

        self.model = oracle_model(family)
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        self.hidden = torch.zeros(0)
        self.place = torch.zeros(0)
        self.weights: dict[int, Tensor] = {}

    def advance(self, ids: Tensor, mask: Tensor) -> None:
        """Make room for new tokens; they are seen and lie at their sequence positions."""
        rows, new = ids.shape
        if self.mask.numel() == 0:
            self.mask = mask[:, :0]
            self.hidden = torch.zeros(LAYERS, rows, KV_HEADS, 0, dtype=torch.bool)
            self.place = torch.zeros(LAYERS, rows, KV_HEADS, 0, dtype=torch.long)
        positions = (self.mask.sum(1, keepdim=True) + mask.cumsum(1) - 1).clamp(min=0)
        self.queries = positions
        self.mask = torch.cat([self.mask, mask], 1)
        shape = (LAYERS, rows, KV_HEADS, new)
        self.hidden = torch.cat([self.hidden, (mask == 0)[None, :, None].expand(shape)], -1)
        self.place = torch.cat([self.place, positions[None, :, None].expand(shape)], -1)
        Oracle.current = self

    @torch.no_grad()
    def feed(self, ids: Tensor, mask: Tensor | None = None, **extra: Any) -> Tensor:
        """Logits of all new tokens."""
        self.advance(ids, torch.ones_like(ids) if mask is None else mask)
        return self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(self.mask),
            position_ids=torch.zeros_like(ids),
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        ).logits

    def drop(self, table: Tensor, *, packed: bool) -> None:
        """Hide what the table (by sequence position) does not hold; packed: what stays ends at the next token."""
        columns = self.mask.shape[1]
        for row in range(self.mask.shape[0]):
            real = torch.nonzero(self.mask[row]).flatten()
            for layer in range(LAYERS):
                for head in range(KV_HEADS):
                    held = real[table[layer, row, head, : len(real)]]
                    hidden = torch.ones(columns, dtype=torch.bool)
                    hidden[held] = False
                    assert not (self.hidden[layer, row, head] & ~hidden).any(), "a dropped entry came back"
                    self.hidden[layer, row, head] = hidden
                    if packed:
                        self.place[layer, row, head, held] = torch.arange(len(real) - len(held), len(real))


def oracle_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention written out, masked and rotated as the current oracle says."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    oracle, layer = Oracle.current, module.layer_idx
    rows, heads, new, width = query.shape
    kv_heads, length = key.shape[1:3]
    rotary = oracle.model.get_decoder().rotary_emb
    query, _ = apply_rotary_pos_emb(query, query, *rotary(query, oracle.queries))
    flat = key.reshape(rows * kv_heads, 1, length, width)
    _, flat = apply_rotary_pos_emb(flat, flat, *rotary(key, oracle.place[layer].reshape(rows * kv_heads, length)))
    key = flat.view_as(key).repeat_interleave(heads // kv_heads, 1)
    value = value.repeat_interleave(heads // kv_heads, 1)
    hidden = oracle.hidden[layer].repeat_interleave(heads // kv_heads, 1)
    column, own = torch.arange(length), torch.arange(length - new, length)[:, None]
    blocked = (column > own) | (hidden[:, :, None] & (column != own))
    weights = (scaling * query @ key.transpose(-1, -2)).masked_fill(blocked, float("-inf")).softmax(-1)
    oracle.weights[layer] = weights
    return (weights @ value).transpose(1, 2).contiguous(), None


@lru_cache
def oracle_model(family: str) -> Any:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("test_oracle", oracle_attention)
    AttentionMaskInterface.register("test_oracle", sdpa_mask)
    model = copy.deepcopy(model_of(family))
    model.set_attn_implementation({"text_config": "test_oracle"} if family == "llava" else "test_oracle")
    return model


def gap(got: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference of logits at real tokens."""
    difference = (got - expected).abs().amax(-1)
    return float(difference.max() if mask is None else difference[mask.bool()].max())


def policy_with(score: Any, **attributes: Any) -> Policy:
    """A policy whose score is the given function of the state."""

    class Custom(Policy):
        def score(self, kv: Any) -> Tensor:
            return score(kv)

    for name, value in attributes.items():
        setattr(Custom, name, value)
    return Custom()


def same(got: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, room that was never written included (it may hold NaN)."""
    return got.shape == expected.shape and torch.allclose(
        got.double(), expected.double(), rtol=0, atol=0, equal_nan=True
    )
