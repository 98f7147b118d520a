"""Files are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(file: Path, content: bytes) -> None:
    """Write beside the final name, sync, rename: a reader sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with fresh.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(fresh, file)


def write_text(file: Path, text: str) -> None:
    """Text in UTF-8, whole or not at all."""
    write_bytes(file, text.encode())


def write_json(file: Path, value: Any) -> None:
    """Indented JSON, whole or not at all."""
    write_text(file, json.dumps(value, indent=2, default=str) + "\n")
