"""Conversations on disk: what a cache holds as one safetensors file, written whole or not at all."""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retention.cache import storage
from retention.cache.buffer import Buffer
from retention.cache.config import REMEMBER
from retention.cache.ledger import PeakMeter
from retention.cache.storage import Entries, LayerStorage
from retention.files import write_bytes
from retention.policies.collect import COLLECTORS

if TYPE_CHECKING:
    from retention.cache.evicting import EvictingCache

FORMAT_VERSION = 1
_TOKENS = ("valid", "visual", "wanted", "prompted", "pending", "evidence", "left", "left_of", "places")
_ROTATION = ("versions", "coordinates", "next", "reached")
_PLAIN = (bool, int, float, str)


def save_cache(cache: "EvictingCache", file: Path) -> None:
    """Write what a cache holds: entries, statistics, positions, and where in its schedule it is."""
    tensors: dict[str, Tensor | None] = {f"tokens.{name}": getattr(cache.tokens, name) for name in _TOKENS}
    tensors |= {f"inputs.{name}": x for name, x in cache.tokens.inputs.packed().items()}
    tensors["rope_deltas"] = cache.rope_deltas
    if cache.rotation is not None:
        tensors |= {f"rotation.{name}": getattr(cache.rotation, name) for name in _ROTATION}
        tensors |= {f"rotation.frequencies.{i}": x for i, x in enumerate(cache.rotation.frequencies)}
    layers: list[dict[str, Any]] = []
    for number, layer in enumerate(cache.layers):
        if layer in cache.evicting_layers:
            held, plain = _pack_store(layer.store)
            held |= {f"observed.{name}": x for name, x in layer.observed.items()}
            held |= {f"recalled.{name}": x for name, x in layer.recalled.items()}
            plain["length"], held["heard"] = layer.length, layer.heard
        else:
            held, plain = _pack_stock(layer)
        tensors |= {f"layers.{number}.{name}": x for name, x in held.items()}
        layers.append(plain)
    state = {
        "format_version": FORMAT_VERSION,
        "base": cache.base,
        "shape": cache.shape.to_dict(),
        "policy": type(cache.policy).__name__,
        "positions": cache.config.positions,
        "collectors": cache.collectors,
        "page": storage.PAGE,
        "rotates": cache.rotation is not None,
        "tokens": cache.columns,
        "memory": _memory(cache),
        "evicted": cache.evicted,
        "tail_padded": cache.tail_padded,
        "since_eviction": cache.trigger.since_eviction,
        "layers": layers,
    }
    packed = {name: x.detach().contiguous().clone() for name, x in tensors.items() if x is not None}
    write_bytes(Path(file), save(packed, metadata={"retention_cache": json.dumps(state)}))


def restore_cache(cache: "EvictingCache", file: Path) -> None:
    """Continue a saved conversation: replaces what the cache holds; policy and budget are those of the cache.

    Raises:
        ValueError: when the file is missing, damaged, newer, of another base, or lacks what the policy reads.
    """
    state, tensors = _read(Path(file))
    _check(cache, state, file)
    cache.reset()  # with tokens of its own
    device = cache.device
    tensors = {name: x.to(device) for name, x in tensors.items()}
    for name in _TOKENS:
        setattr(cache.tokens, name, tensors.get(f"tokens.{name}"))
    cache.tokens.inputs.unpack(_named(tensors, "inputs."))
    cache.rope_deltas = tensors.get("rope_deltas")
    if cache.rotation is not None and "rotation.versions" in tensors:
        for name in _ROTATION:
            setattr(cache.rotation, name, tensors.get(f"rotation.{name}"))
        count = sum(name.startswith("rotation.frequencies.") for name in tensors)
        cache.rotation.frequencies = [tensors[f"rotation.frequencies.{i}"] for i in range(count)]
    for number, (layer, plain) in enumerate(zip(cache.layers, state["layers"], strict=True)):
        prefix = f"layers.{number}."
        held = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        if layer in cache.evicting_layers:
            layer.length = plain["length"]
            layer.store = _unpack_store(held, plain)
            layer.observed = _named(held, "observed.")
            layer.recalled = _named(held, "recalled.")
            layer.heard = held.get("heard")
        else:
            _unpack_stock(layer, held, plain)
    cache.evicted, cache.tail_padded = state["evicted"], state["tail_padded"]
    cache.trigger.since_eviction = state["since_eviction"]
    for layer in cache.evicting_layers:
        layer.forget_unused(keep_gate="gate" in cache.collectors)
    cache.meter = PeakMeter()
    cache.note_peak()


def _named(held: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in held.items() if name.startswith(prefix)}


def _pack_store(store: LayerStorage) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    held: dict[str, Tensor | None] = {"counts": store.counts, "page_counts": store.page_counts, "owner": store.owner}
    for group in ("pages", "loose"):
        held |= {f"{group}.{i}": x for i, x in enumerate(getattr(store, group))}
    held |= {f"buffers.{i}": buffer.view() for i, buffer in enumerate(store.buffers)}
    held["log_beta"] = None if store.log_beta is None else store.log_beta.view()
    if store.entries is not None:
        held |= {f"entries.{field.name}": getattr(store.entries, field.name) for field in fields(Entries)}
    return held, {name: getattr(store, name) for name in ("longest", "uniform", "front", "longest_pages")}


def _unpack_store(held: dict[str, Tensor], plain: dict[str, Any]) -> LayerStorage:
    store = LayerStorage()
    store.counts, store.page_counts, store.owner = (held.get(name) for name in ("counts", "page_counts", "owner"))
    store.pages, store.loose = (
        [held[f"{group}.{i}"] for i in (0, 1) if f"{group}.{i}" in held] for group in ("pages", "loose")
    )
    store.buffers = [Buffer(held[f"buffers.{i}"]) for i in (0, 1) if f"buffers.{i}" in held]
    store.log_beta = Buffer(held["log_beta"]) if "log_beta" in held else None
    if "entries.positions" in held:
        store.entries = Entries(*(held.get(f"entries.{field.name}") for field in fields(Entries)))  # type: ignore[arg-type]
    for name in ("longest", "uniform", "front", "longest_pages"):
        setattr(store, name, plain[name])
    return store


def _pack_stock(layer: Any) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Tensors and plain values of a layer that stays transformers' own; dicts by integer are flattened."""
    held: dict[str, Tensor | None] = {}
    plain: dict[str, Any] = {}
    for name, value in vars(layer).items():
        for key, item in (
            {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        ).items():
            if isinstance(item, Tensor):
                held[key] = item
            elif isinstance(item, _PLAIN):
                plain[key] = item
    return held, plain


def _unpack_stock(layer: Any, held: dict[str, Tensor], plain: dict[str, Any]) -> None:
    for key, value in {**plain, **held}.items():
        name, _, number = key.partition("/")
        if number:
            getattr(layer, name)[int(number)] = value
        else:
            setattr(layer, name, value)
    first = next((x for x in held.values() if x.is_floating_point()), None)
    if first is not None:
        layer.dtype, layer.device = first.dtype, first.device


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise ValueError(f"expected a saved conversation at {file}, found none; check the path")
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("retention_cache")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
        state = json.loads(text) if text else None
    except (ValueError, SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"the saved conversation {file} is damaged ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict):
        raise ValueError(f"expected a saved conversation at {file}, got another safetensors file")
    version = state.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"expected a conversation of format {FORMAT_VERSION} or older in {file}, got {version!r}; update retention"
        )
    return state, tensors


def _memory(cache: "EvictingCache") -> dict[str, Any] | None:
    """The memory in force; its trained parameters are not in the file."""
    return cache.memory.config.to_dict() if cache.memory is not None and cache.on_evict in REMEMBER else None


def _check(cache: "EvictingCache", state: dict[str, Any], file: Path) -> None:
    if state["base"] != cache.base or state["shape"] != json.loads(json.dumps(cache.shape.to_dict())):
        raise ValueError(
            f"the conversation in {file} was had with another model or dtype; open the cache on the model it was saved with"
        )
    if state["evicted"] and state["positions"] != cache.config.positions:
        raise ValueError(
            f"the conversation in {file} was evicted with positions={state['positions']}, this cache has "
            f"positions={cache.config.positions}; open it with the former"
        )
    if state["page"] != storage.PAGE:
        raise ValueError(
            f"the conversation in {file} lies in pages of {state['page']} entries, this version has pages of "
            f"{storage.PAGE}; restore it with the version that saved it"
        )
    if cache.packs and state["tokens"] and not state["rotates"]:
        raise ValueError(
            f"the conversation in {file} was had without noting rotary positions, this cache has positions=packed; open "
            "it with positions=original, or have the conversation in a cache with packed=True"
        )
    lasting = {name for name, x in COLLECTORS.items() if x is not None and x.accumulates}
    if state["evicted"] and state.get("memory") != _memory(cache):
        raise ValueError(
            f"the conversation in {file} was had with memory {state.get('memory')}, this cache has {_memory(cache)}; "
            "open it with the same"
        )
    needed = set(cache.collectors) & {"gate", *lasting}
    missing = sorted(needed - set(state["collectors"]))
    if missing:
        raise ValueError(
            f"{type(cache.policy).__name__} reads {missing[0]!r}, which the conversation in {file} (had with "
            f"{state['policy']}) did not collect; open the cache with that policy"
        )
