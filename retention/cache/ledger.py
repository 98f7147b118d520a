"""Bytes by item: what a cache really holds, now, at its peak, and what an ideal store would need."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retention.cache.storage import LayerStorage

ITEMS = ("keys", "values", "scores", "positions", "slack", "memory", "statistics", "layout", "outside")
"""Rows of the ledger: `slack` is memory reserved for entries that are not there (room to grow, holes of a buffer,
padding), `memory` a state of evicted tokens, `outside` what layers that are never evicted hold."""


@dataclass
class Ledger:
    """Bytes by item (`ITEMS`); `peak` is the largest physical total so far, transients included."""

    physical: dict[str, int]
    logical: dict[str, int]
    peak: int

    @classmethod
    def of(cls, allocated: dict[str, int], logical: dict[str, int], peak: int) -> "Ledger":
        """The ledger of what is allocated by item, with what entries do not fill moved to `slack`."""
        physical = dict(allocated)
        for item, needed in logical.items():
            physical[item] = min(allocated[item], needed)
            physical["slack"] += allocated[item] - physical[item]
        return cls(physical, logical, peak)

    @property
    def total(self) -> int:
        """Physical bytes held now."""
        return sum(self.physical.values())

    @property
    def logical_total(self) -> int:
        """Bytes of an ideal packed store of the same entries."""
        return sum(self.logical.values())


def physical_bytes(tensors: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
    """Allocated bytes by item; storage shared between tensors is counted once, under its first item."""
    known: set[int] = set()
    rows = dict.fromkeys(ITEMS, 0)
    for item, group in tensors.items():
        for tensor in group:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                rows[item] += storage.nbytes()
    return rows


def logical_bytes(stores: Sequence[LayerStorage], entries: int) -> dict[str, int]:
    """What an ideal packed store of `entries` would need, by item."""
    keys, values = (buffer.entry_bytes for buffer in stores[0].buffers) if stores[0].buffers else (0, 0)
    known = [store.entries for store in stores if store.entries is not None]
    placed = [x for e in known for x in (e.positions, e.coordinates) if x is not None]
    return {
        "keys": entries * keys,
        "values": entries * values,
        "positions": sum(x.numel() * x.element_size() for x in placed),
        "scores": entries * stores[0].gate_bytes,
    }


def stock_tensors(layer: Any) -> list[Tensor]:
    """Tensors of a layer that stays transformers' own: sliding windows, convolution and recurrent states."""
    found: list[Any] = []
    for value in vars(layer).values():
        found.extend(value.values() if isinstance(value, dict) else [value])
    return [x for x in found if isinstance(x, Tensor)]


@dataclass
class PeakMeter:
    """Remembers the largest total it was told."""

    peak: int = 0

    def note(self, total: int) -> None:
        """Record a total in bytes."""
        self.peak = max(self.peak, total)
