"""Several gate sets for one frozen model, by name: a folder with one artefact for each."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelHubMixin

from retention import checkpoint
from retention.gates.base import RetentionGates
from retention.gates.loading import folder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What a set may be called, since it names a folder."""
MOST = 256


class GateSets(ModelHubMixin, library_name="retention", tags=["kv-cache"]):
    """Gates by name, all trained for the same base: `evicting(model, policy, gates=sets["maths"])`.

    Inside one such block `retention.attach.switch.use_gates(cache.fork(), sets["chat"])` gives each conversation its own.
    """

    def __init__(self, sets: Mapping[str, RetentionGates]) -> None:
        """Raises ValueError for no sets, names that name no folder, or gates of different bases."""
        self._hub_mixin_config = None
        if not sets:
            raise ValueError('expected at least one gate set, got none; e.g. GateSets({"maths": gates})')
        for name, gates in sets.items():
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"expected gate sets named by letters, digits, - and _, got {checkpoint.shown(name)}; rename it"
                )
            next(iter(sets.values())).check_beside(gates)
        if len({name.casefold() for name in sets}) < len(sets):
            raise ValueError(
                f"expected gate sets whose names differ in more than case, got {', '.join(sets)}; rename one"
            )
        self._sets = dict(sets)

    def __getitem__(self, name: str) -> RetentionGates:
        if name not in self._sets:
            raise ValueError(f"expected a gate set among {', '.join(self._sets)}, got {checkpoint.shown(name)}")
        return self._sets[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the order given."""
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def check(self, model: "PreTrainedModel") -> None:
        """Refuse a model that these sets were not trained for, as `RetentionGates.check` does."""
        for gates in self._sets.values():
            gates.check(model)

    def save_pretrained(self, save_directory: str | Path, *, storage: str = "float32", **hub: Any) -> str | None:
        """Write one artefact for each set, each atomically; other folders are left alone."""
        folder, storage = Path(save_directory), (hub.pop("model_card_kwargs", None) or {}).get("storage", storage)
        for name, gates in self._sets.items():
            gates.save_pretrained(folder / name, storage=storage)
        if not hub.pop("push_to_hub", False):
            return None
        return self.push_to_hub(hub.pop("repo_id", None) or folder.name, storage=storage, **hub)

    def push_to_hub(self, repo_id: str, *, storage: str = "float32", **hub: Any) -> str:
        """Upload the folder; further arguments as in huggingface_hub's mixin. Returns the commit's address."""
        return super().push_to_hub(repo_id, model_card_kwargs={"storage": storage}, **hub)

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> "GateSets":  # type: ignore[override]  # ours
        """Read every artefact of a folder or a hub id.

        Raises:
            ValueError: when there is none, or one of them is refused.
        """
        folder = folder_of(name, [f"*/{file}" for file in checkpoint.FILES], **hub)
        found = sorted(file.parent for file in folder.glob(f"[!.]*/{checkpoint.CONFIG}"))  # not a save that was cut off
        if not 0 < len(found) <= MOST:
            raise ValueError(
                f"expected a folder with 1 to {MOST} gate sets at {folder}, got {len(found)}; one set alone is read by "
                "RetentionGates.from_pretrained"
            )
        return cls({part.name: RetentionGates.from_pretrained(part) for part in found})
