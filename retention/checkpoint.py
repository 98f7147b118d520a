"""The only reader and writer of the gate artefact: JSON config, safetensors, model card, written whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
CONFIG, TENSORS, CARD = "gate_config.json", "gate_model.safetensors", "README.md"
PARTS = ("base", "shape", "gate", "training")


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> Path:
    """Write an artefact to a temporary sibling, sync it, and swap it in under its name.

    An existing artefact is replaced as a whole; other files in an existing folder are kept.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, fresh / TENSORS, metadata={"format": "pt"}
        )
        whole = {**config, "tensors_sha256": _digest(fresh / TENSORS)}
        (fresh / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
        (fresh / CARD).write_text(card)
        for name in (TENSORS, CONFIG, CARD):
            with open(fresh / name, "rb") as file:
                os.fsync(file.fileno())
        _swap(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _swap(fresh: Path, folder: Path) -> None:
    """Rename into place; a folder that is there already gives up its files one atomic rename at a time, config last."""
    try:
        os.rename(fresh, folder)
        os.chmod(folder, 0o755)
    except OSError:
        for name in (TENSORS, CARD, CONFIG):
            os.replace(fresh / name, folder / name)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an artefact; nothing in it is executed.

    Raises:
        ValueError: when a file is missing, damaged, or of a newer format.
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise ValueError(
                f"expected a gate artefact with {name} in {folder}, found none; train one or check the path"
            )
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (ValueError, SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the gate artefact in {folder} is damaged ({str(error).splitlines()[0]}); export it again"
        ) from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"expected a gate artefact of format {FORMAT_VERSION} or older in {folder}, got {version!r}; update retention"
        )
    missing = [part for part in PARTS if part not in config]
    if missing:
        raise ValueError(f"the gate artefact in {folder} is damaged ({CONFIG} lacks {missing[0]}); export it again")
    if config.get("tensors_sha256") not in (None, _digest(folder / TENSORS)):
        raise ValueError(f"the gate artefact in {folder} is damaged (files of two writes are mixed); export it again")
    return config, tensors
