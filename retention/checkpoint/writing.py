"""Artefacts are written whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from retention.checkpoint.format import CONFIG, FILES, TENSORS
from retention.checkpoint.reading import LARGEST_CONFIG
from retention.checkpoint.storage import packed
from retention.checkpoint.text import parsed


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: Mapping[str, bytes]) -> Path:
    """Write an artefact to a temporary folder, sync it, and swap it in under its name.

    Tensors are stored as the config's `storage` says; `card` is the model card and what it shows, by file name. An
    existing artefact is replaced as a whole; other files in an existing folder are kept.

    Raises:
        ValueError: for what could not be read again, or a folder that is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder for the gate artefact, got the file {folder}; name another one")
    content = save(packed(tensors, config["storage"]), metadata={"format": "pt"})
    whole = {**config, "tensors_sha256": hashlib.sha256(content).hexdigest()}
    text = (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode()
    parsed(text, f"the config of the gates for {folder}")
    if len(text) > LARGEST_CONFIG:
        raise ValueError(
            f"expected a config of at most {LARGEST_CONFIG} bytes, got {len(text)}; shorten the gates' training_record"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    home = folder if folder.is_dir() else folder.parent  # a folder that is there may be on another disk than its parent
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=home))
    try:
        for name, data in ({TENSORS: content, CONFIG: text} | dict(card)).items():
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
    os.chmod(fresh, 0o755)
    try:
        os.rename(fresh, folder)
    except OSError:  # also where another process made it in the meantime
        with _restored(folder, fresh / "before"):
            for name in FILES:
                if (fresh / name).exists():
                    os.replace(fresh / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)


@contextmanager
def _restored(folder: Path, before: Path) -> Iterator[None]:
    """Put the artefact that was there back if its replacement is interrupted or refused half way."""
    before.mkdir()
    there = [name for name in FILES if os.path.lexists(folder / name)]
    for name in there:
        shutil.copy2(folder / name, before / name, follow_symlinks=False)
    try:
        yield
    except BaseException:
        for name in there:
            os.replace(before / name, folder / name)
        for name in set(FILES).difference(there):
            (folder / name).unlink(missing_ok=True)
        raise
