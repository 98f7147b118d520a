"""What pictures and the example browser are drawn from, on disk: `diagnostics/<task>/*.npz` of a run."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int16, Int64, Integer, UInt8, UInt16

KINDS = ("text", "image")
"""Modalities, in the order of the last axis of counts."""
FOLDER = "diagnostics"


@dataclass
class Look:
    """What one policy at one budget keeps of a few contexts, counted by layer, head, place in the context and modality."""

    task: str
    policy: str
    scope: str
    protocol: str
    budget: str
    kept: Int64[np.ndarray, "layers kv_heads places 2"]
    seen: Int64[np.ndarray, "places 2"]
    held: list[UInt16[np.ndarray, " _"]] = field(default_factory=list)
    """For each shown context, how many (layer, head) hold each token."""
    contexts: int | None = None
    """How many were looked at; None in what older runs left."""

    @property
    def cells(self) -> int:
        """Number of (layer, head)."""
        return self.kept.shape[0] * self.kept.shape[1]

    def save(self, folder: Path) -> Path:
        """Write into the task's folder."""
        file = self.file(folder, self.task, self.protocol, self.policy, self.scope, self.budget)
        about = {name: getattr(self, name) for name in ("task", "policy", "scope", "protocol", "budget", "contexts")}
        held = {f"held_{i}": counts for i, counts in enumerate(self.held)}
        return _write(file, about, {"kept": self.kept, "seen": self.seen} | held)

    @staticmethod
    def file(folder: Path, task: str, *told: str) -> Path:
        """Where the look of an arm lies; named by protocol, policy, scope and budget."""
        return folder / FOLDER / slug(task) / "arms" / f"{slug(' '.join(told))}.npz"

    @classmethod
    def load(cls, file: Path) -> "Look":
        """Read one back."""
        about, arrays = _read(file)
        held = [arrays[f"held_{i}"] for i in range(len(arrays) - 2)]
        return cls(**about, kept=arrays["kept"], seen=arrays["seen"], held=held)


@dataclass
class Shown:
    """One context as a reader sees it: tokens, images, what is asked and where the evidence lies."""

    id: str
    tokens: list[str]
    visual: Bool[np.ndarray, " tokens"]
    places: Int16[np.ndarray, "tokens 3"] | None
    """Image, row and column of every visual token, -1 for what is none; None where that is not known."""
    images: list[UInt8[np.ndarray, "_ _ 3"]]
    turns: list[dict[str, Any]]
    """Question, answer, and positions of the evidence or None."""

    def grid(self, image: int) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        assert self.places is not None
        own = self.places[self.places[:, 0] == image]
        return (int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1) if len(own) else (0, 0)

    def laid(self, values: Integer[np.ndarray, " tokens"], image: int) -> Integer[np.ndarray, "_ _"]:
        """Values of tokens on an image's grid."""
        assert self.places is not None
        mine = self.places[:, 0] == image
        table = np.zeros(self.grid(image), dtype=values.dtype)
        table[self.places[mine, 1], self.places[mine, 2]] = values[mine]
        return table

    def evidence(self) -> list[int]:
        """Positions that any turn asks about."""
        return sorted({place for turn in self.turns for place in turn["evidence"] or []})


@dataclass
class Lives:
    """How many tokens of a few contexts have which half-life by the gates, by layer, head and modality."""

    task: str
    counts: Int64[np.ndarray, "layers kv_heads 2 bins"]

    def save(self, folder: Path) -> Path:
        """Write into the task's folder."""
        return _write(folder / FOLDER / slug(self.task) / "gates.npz", {"task": self.task}, {"counts": self.counts})


BINS = 21
"""Half-lives are counted by their power of two: below 2 tokens, below 4, ... and the last bin is open."""


def save_shown(folder: Path, task: str, contexts: list[Shown]) -> Path:
    """Write the shown contexts of a task."""
    arrays: dict[str, np.ndarray] = {}
    for i, context in enumerate(contexts):
        arrays[f"visual_{i}"] = context.visual
        if context.places is not None:
            arrays[f"places_{i}"] = context.places
        arrays |= {f"image_{i}_{j}": image for j, image in enumerate(context.images)}
    about = {"task": task, "contexts": [{"id": c.id, "tokens": c.tokens, "turns": c.turns} for c in contexts]}
    return _write(folder / FOLDER / slug(task) / "contexts.npz", about, arrays)


def load_looks(folder: Path, task: str) -> list[Look]:
    """The looks of a task, in the order of their names."""
    return [Look.load(file) for file in sorted((folder / FOLDER / slug(task) / "arms").glob("*.npz"))]


def load_shown(folder: Path, task: str) -> list[Shown]:
    """The shown contexts of a task; none where a run stored none."""
    file = folder / FOLDER / slug(task) / "contexts.npz"
    if not file.exists():
        return []
    about, arrays = _read(file)
    found = []
    for i, told in enumerate(about["contexts"]):
        images = [arrays[name] for name in sorted(arrays, key=_number) if name.startswith(f"image_{i}_")]
        place = arrays.get(f"places_{i}")
        found.append(Shown(told["id"], told["tokens"], arrays[f"visual_{i}"], place, images, told["turns"]))
    return found


def load_lives(folder: Path, task: str) -> Lives | None:
    """The half-lives of a task; None where a run had no gates that decay."""
    file = folder / FOLDER / slug(task) / "gates.npz"
    return Lives(task, _read(file)[1]["counts"]) if file.exists() else None


def slug(text: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^\w.%+-]+", "_", text)


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _write(file: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """Arrays with a JSON text beside them, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}")
    with draft.open("wb") as handle:
        np.savez_compressed(handle, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    draft.replace(file)
    return file


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(file, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    return json.loads(str(arrays.pop("about"))), arrays
