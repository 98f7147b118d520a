"""Which positions an eviction kept, per layer and head, as data for engines that hold their own cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from retention.attach.hard import evicting
from retention.cache.config import CacheConfig
from retention.cache.evicting import EvictingCache
from retention.checkpoint import parsed
from retention.files import write_bytes, write_json
from retention.gates import RetentionGates
from retention.policies import Policy
from retention.provenance import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
TENSORS, CARD = "kept.safetensors", "kept.json"


@dataclass
class Kept:
    """What an evicting cache holds, without keys and values."""

    positions: Int[Tensor, " entries"]
    """Sequence index of every kept token, padding excluded, ascending within a head; heads of a row, rows of a layer
    and layers follow one another."""
    counts: Int[Tensor, "layers batch kv_heads"]
    """Entries of each head: how `positions` is cut."""
    seen: Int[Tensor, " batch"]
    """Tokens of each row: the rotary position of the next one, unless the model counts otherwise."""
    about: dict[str, Any]
    """Format version, base, decoder layers, policy, budget asked for and resolved, how keys are rotated, versions."""

    @classmethod
    def of(cls, cache: EvictingCache) -> "Kept":
        """What a cache holds now."""
        table = cache.kept_table().cpu()
        about = {
            "format_version": FORMAT_VERSION,
            "base": cache.base,
            "model_type": cache.shape.model_type,
            "layers": list(cache.shape.layers),
            "kv_heads": cache.shape.num_kv_heads,
            "policy": type(cache.policy).__name__,
            "budget": str(cache.config.budget),
            "budget_resolved": cache.resolved,
            "rotation": cache.config.positions,
            "versions": package_versions(),
        }
        return cls(torch.nonzero(table)[:, 3].int(), table.sum(-1).int(), cache.seen().cpu().int(), about)

    def of_head(self, layer: int, row: int, head: int) -> Int[Tensor, " kept"]:
        """Positions of one head; `layer` numbers evictable layers, `about["layers"]` says which they are."""
        number = (layer * self.counts.shape[1] + row) * self.counts.shape[2] + head
        start = int(self.counts.flatten()[:number].sum())
        return self.positions[start : start + int(self.counts[layer, row, head])]

    def save(self, folder: Path | str) -> Path:
        """Write `kept.safetensors` and `kept.json`, the latter last."""
        folder = Path(folder)
        tensors = {"positions": self.positions, "counts": self.counts, "seen": self.seen}
        write_bytes(folder / TENSORS, save({name: x.contiguous() for name, x in tensors.items()}))
        write_json(folder / CARD, self.about)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> "Kept":
        """Read both files.

        Raises:
            ValueError: when one is missing, damaged or of a newer format, or they do not fit each other.
        """
        folder = Path(folder)
        try:
            about, tensors = parsed((folder / CARD).read_bytes(), CARD), load_file(folder / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"expected {CARD} and {TENSORS} in {folder}, got {type(error).__name__}") from error
        version = about.get("format_version") if isinstance(about, dict) else None
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(f"expected kept positions of format {FORMAT_VERSION} in {folder}; update retention")
        found = [tensors.get(name) for name in ("positions", "counts", "seen")]
        positions, counts, seen = (x if x is not None and x.dtype is torch.int32 else torch.zeros(()) for x in found)
        fit = (positions.dim(), counts.dim()) == (1, 3) and seen.shape == counts.shape[1:2]
        if not fit or bool((counts < 0).any()) or int(counts.sum()) != len(positions):
            raise ValueError(f"the tensors in {folder / TENSORS} are no kept positions; write them again")
        return cls(positions, counts, seen, about)


@torch.no_grad()
def kept_positions(
    model: "PreTrainedModel",
    inputs: Mapping[str, Any],
    policy: Policy,
    config: CacheConfig | None = None,
    *,
    gates: RetentionGates | None = None,
) -> Kept:
    """Feed a prompt, evict, and say what stayed.

    Raises:
        ValueError: as `retention.evicting` does.
    """
    with evicting(model, policy, config, gates=gates) as cache:
        model(**inputs, past_key_values=cache, use_cache=True)
        return Kept.of(cache)
