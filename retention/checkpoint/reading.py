"""Reads artefacts that may come from anybody: nothing is executed, and nothing large is allocated before it is checked."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from retention.checkpoint.format import CONFIG, TENSORS, present
from retention.checkpoint.storage import STORAGES, layout, unpacked
from retention.checkpoint.text import parsed

LARGEST_CONFIG, LARGEST_HEADER, LARGEST_FILE = 4 * 2**20, 4 * 2**20, 4 * 2**30
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass
class Artefact:
    """A checked config, and what the tensors beside it are; they are loaded when asked for."""

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Of the tensors by their names."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, float32.

        Raises:
            ValueError: when the file is not the one that the config was written with.
        """
        content = (self.folder / TENSORS).read_bytes()
        expected = self.config.get("tensors_sha256")
        if expected not in (None, hashlib.sha256(content).hexdigest()):
            raise damaged(self.folder, "files of two writes are mixed")
        try:
            tensors = unpacked(load(content))
        except (SafetensorError, ValueError) as error:
            raise damaged(self.folder, str(error)) from error
        if not all(bool(x.isfinite().all()) for x in tensors.values()):
            raise damaged(self.folder, "it holds numbers that are not finite")
        return tensors


def damaged(folder: Path, why: str) -> ValueError:
    """The one sentence for what cannot be read."""
    line = (why.splitlines() or ["unreadable"])[0]
    return ValueError(f"the gate artefact in {folder} is damaged ({line[:160]}); export it again")


def read(folder: Path) -> Artefact:
    """The artefact of a folder: its config in the present format, and the shapes of its tensors.

    Raises:
        ValueError: when a file is missing, damaged, too large, elsewhere, or of a newer format.
    """
    folder = Path(folder)
    for name, largest in ((CONFIG, LARGEST_CONFIG), (TENSORS, LARGEST_FILE)):
        file = folder / name
        if not file.is_file():
            raise ValueError(
                f"expected a gate artefact with {name} in {folder}, found none; train one or check the path"
            )
        if file.is_symlink() and not any(file.resolve().is_relative_to(home) for home in _homes(folder)):
            raise damaged(folder, f"{name} is a link to somewhere else")
        if file.stat().st_size > largest:
            raise damaged(folder, f"{name} is larger than {largest // 2**20} MiB")
    try:
        told = parsed((folder / CONFIG).read_bytes(), CONFIG)
    except (OSError, ValueError) as error:
        raise damaged(folder, str(error)) from error
    config = present(told, folder)
    if config["storage"] not in STORAGES:
        raise ValueError(
            f"expected the gate artefact in {folder} to be stored as one of {', '.join(STORAGES)}, got "
            f"{config['storage'][:40]!r}; update retention"
        )
    return Artefact(folder, config, _shapes(folder))


def _homes(folder: Path) -> list[Path]:
    """Where links in an artefact may lead: its own folder, and the blobs of the hub's cache for a snapshot."""
    real = folder.resolve()
    return [real, *(place.parents[1] / "blobs" for place in (real, *real.parents) if place.parent.name == "snapshots")]


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name off the header, whose length is checked before anything parses it."""
    try:
        with open(folder / TENSORS, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"the header of {TENSORS} is larger than {LARGEST_HEADER // 2**20} MiB")
            parsed(file.read(length), f"the header of {TENSORS}")
        with safe_open(folder / TENSORS, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        for name, (_, dtype) in stored.items():
            if dtype not in (*FLOATS, "I8"):
                raise ValueError(f"{name[:80]!r} is of the kind {dtype}")
        return layout({name: (shape, dtype == "I8") for name, (shape, dtype) in stored.items()})
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(folder, str(error)) from error
