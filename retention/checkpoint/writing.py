"""Artefacts are written whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from retention.checkpoint.format import CARD, CONFIG, TENSORS
from retention.checkpoint.storage import packed


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> Path:
    """Write an artefact to a temporary sibling, sync it, and swap it in under its name.

    Tensors are stored as the config's `storage` says. An existing artefact is replaced as a whole; other files in an
    existing folder are kept.
    """
    folder = Path(folder)
    content = save(packed(tensors, config["storage"]), metadata={"format": "pt"})
    whole = {**config, "tensors_sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(whole, indent=2, sort_keys=True) + "\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, data in ((TENSORS, content), (CONFIG, text.encode()), (CARD, card.encode())):
            with open(fresh / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _swap(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _swap(fresh: Path, folder: Path) -> None:
    """Rename into place; a folder that is there already gives up its files one atomic rename at a time, config last."""
    try:
        os.rename(fresh, folder)
        os.chmod(folder, 0o755)
    except OSError:
        for name in (TENSORS, CARD, CONFIG):
            os.replace(fresh / name, folder / name)
