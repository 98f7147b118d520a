"""What `bench_decode.py` measures on: a model, caches of it filled with random tensors, and single tokens timed on them.

Caches of this package are filled by the calls a forward makes, the stock ones by their own `update`. Devices are a
parameter: wall clock on a CPU, events with synchronisation on both ends on CUDA.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import retention as rt
from retention.attach.hard import new_cache
from retention.cache.evicting import EvictingCache
from retention.gates.dbtrim import DBTrim

NOISY = 1.5
"""A cell whose median is more than this many times its minimum is marked."""
WARM_UP = 8


def elapsed(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def noted(owner: Any, name: str, device: torch.device) -> Iterator[list[float]]:
    """Inside the block, the seconds of every call of a method of this one object."""
    spent: list[float] = []
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []
        spent.append(elapsed(device, lambda: found.append(method(*args, **kwargs))))
        return found[0]

    setattr(owner, name, timed)
    try:
        yield spent
    finally:
        delattr(owner, name)


def cell(samples: list[float], name: str) -> dict[str, Any]:
    """Minimum and median of some timings, marked where they lie far apart."""
    least, middle = min(samples), statistics.median(samples)
    return {name: least, f"{name}_median": middle, "noisy": middle > NOISY * least}


def bandwidth(device: torch.device, megabytes: int, repeats: int = 10) -> float:
    """Bytes per second of the better of a large copy (read and written) and a large sum (read)."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    calls = ((2, lambda: target.copy_(source)), (1, source.sum))
    best = 0.0
    for _ in range(repeats + 1):
        best = max([best, *(factor * 4 * len(source) / elapsed(device, call) for factor, call in calls)])
    return best


class Bench:
    """A random Llama with random gates on one device."""

    def __init__(self, decoder: dict[str, Any], device: torch.device, memory: float) -> None:
        """`memory`: bytes that caches held at one time may take."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.device, self.memory = device, memory
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(LlamaConfig(**decoder), dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        self.config = self.model.config
        self.gates = rt.RetentionGates.for_model(DBTrim(), self.model).to(device).requires_grad_(False)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one key and value."""
        return 2 * self.config.head_dim * torch.empty(0, dtype=self.dtype).element_size()

    @property
    def heads(self) -> int:
        """KV heads of all layers."""
        return self.config.num_hidden_layers * self.config.num_key_value_heads

    def read_bytes(self) -> int:
        """Bytes of weights that one token reads; an embedding table that is not the output layer's is only looked up."""
        table = 0 if self.config.tie_word_embeddings else self.model.get_input_embeddings().weight.nbytes
        return sum(x.nbytes for x in self.model.parameters()) - table

    def decode(self, running: "Running", tokens: int) -> float:
        """Seconds per token of forwards of one token per row; stock caches on the untouched model."""
        cache, row = running.cache, torch.arange(running.position, running.position + tokens, device=self.device)
        places = row[:, None, None].expand(-1, running.batch, 1)
        token = torch.full((running.batch, 1), 5, device=self.device)
        inside: Any = nullcontext()
        if isinstance(cache, EvictingCache):
            inside = rt.evicting(self.model, cache.policy, cache.config, gates=cache.gates)

        def forwards() -> None:
            for place in places:
                self.model(input_ids=token, past_key_values=cache, use_cache=True, position_ids=place)

        with inside, torch.inference_mode():
            seconds = elapsed(self.device, forwards)
        running.position += tokens
        return seconds / tokens

    def side_by_side(self, running: dict[str, "Running"], rounds: int, tokens: int) -> dict[str, dict[str, Any]]:
        """Milliseconds per token of caches that take turns; the first token, which makes room, apart.

        `growth_ms`: what making room costs more than a token, over the tokens it is made for.
        """
        first = {name: 1e3 * self.decode(one, 1) for name, one in running.items()}
        served = {name: 1 + one.room for name, one in running.items()}
        for one in running.values():
            self.decode(one, WARM_UP - 1)
        samples: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(rounds):
            for name, one in running.items():
                samples[name].append(1e3 * self.decode(one, tokens))
        rows = {name: {"first_ms": first[name], **cell(found, "ms")} for name, found in samples.items()}
        for name, row in rows.items():
            grows = isinstance(running[name].cache, EvictingCache)
            row["growth_ms"] = max(0.0, row["first_ms"] - row["ms_median"]) / served[name] if grows else 0.0
        return rows


@dataclass
class Running:
    """A cache and the position of its next token."""

    cache: Any
    batch: int
    position: int

    @property
    def room(self) -> int:
        """Tokens that fit before memory is made again; 0 for stock caches, which have no growth apart."""
        return self.cache.evicting_layers[0].store.buffers[0].room if isinstance(self.cache, EvictingCache) else 0


class Contents:
    """Random keys, values and gate outputs of a context, and caches that hold them.

    Every layer is fed the same keys and values and stores a copy of its own. Half-lives spread over heads and
    layers, so that one pool leaves heads of very different length.
    """

    def __init__(self, bench: Bench, context: int, batch: int) -> None:
        self.bench, self.context, self.batch = bench, context, batch
        self.shape = (batch, bench.config.num_key_value_heads, context)
        draw = self.generator(0)
        self.keys, self.values = (
            torch.randn(*self.shape, bench.config.head_dim, generator=draw, device=bench.device, dtype=bench.dtype)
            for _ in range(2)
        )
        self.keys *= 1 + 0.1 * torch.randn(batch, self.shape[1], 1, 1, generator=draw, device=bench.device)

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers of their own for each layer."""
        return torch.Generator(self.bench.device).manual_seed(seed)

    @property
    def full_bytes(self) -> int:
        """Keys and values of the whole context in all layers."""
        return self.batch * self.context * self.bench.heads * self.bench.entry_bytes

    def log_beta(self, layer: int) -> Tensor:
        """Gate outputs of a layer: log-normal rates with a factor per layer and one per row and head."""
        draw, (batch, heads, _) = self.generator(layer + 1), self.shape
        sizes = (self.shape, (batch, heads, 1), (1, 1, 1))
        rate = sum(torch.randn(size, generator=draw, device=self.bench.device) for size in sizes)
        return -1e-3 * torch.as_tensor(rate).exp()

    def stock(self, cache: Any) -> Running:
        """A cache of transformers holding the context."""
        for layer in range(self.bench.config.num_hidden_layers):
            cache.update(self.keys, self.values, layer)
        return Running(cache, self.batch, self.context)

    def full(self, kind: str, room: int) -> Running:
        """The whole context in a stock DynamicCache, a StaticCache with `room` for new tokens, or ours without budget."""
        from transformers import DynamicCache, StaticCache

        if kind == "dynamic":
            return self.stock(DynamicCache(config=self.bench.config))
        if kind == "static":
            return self.stock(StaticCache(config=self.bench.config, max_cache_len=self.context + room))
        return self.ours("full", "100%")

    def ours(self, policy: str, budget: str, **settings: Any) -> Running:
        """Ours, filled as a forward of a prompt fills it, evicted to the budget."""
        config = rt.CacheConfig(rt.Budget.parse(budget), **settings)
        cache = new_cache(self.bench.model, rt.POLICIES[policy](), config)
        cache.gates = self.bench.gates if cache.policy.needs_gates else None
        valid = torch.ones(self.batch, self.context, dtype=torch.bool, device=self.bench.device)
        cache.begin(valid, ~valid, prompt=True, padded=False)
        for number, layer in enumerate(cache.evicting_layers):
            layer.staged = self.log_beta(number) if "gate" in cache.collectors else None
            layer.update(self.keys, self.values)
            if "column_sums" in cache.collectors:
                draw = self.generator(number + 1)
                layer.observed["column_sums"] = torch.rand(self.shape, generator=draw, device=self.bench.device)
        cache.after_forward()
        return Running(cache, self.batch, self.context)


def kept(running: Running) -> dict[str, float]:
    """Entries per head: fewest, median, most."""
    table = running.cache.kept().flatten().float()
    return {"kept_min": int(table.min()), "kept_median": float(table.median()), "kept_max": int(table.max())}
