"""Versions of the artefact's format: what the config holds, how older ones are read, and why newer ones are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retention.checkpoint.values import shown

FORMAT_VERSION = 2
CONFIG, TENSORS, CARD, PICTURE = "gate_config.json", "gate_model.safetensors", "README.md", "accuracy.png"
FILES = (TENSORS, CARD, PICTURE, CONFIG)
"""Of an artefact, in the order in which they replace older ones; the picture is there where accuracy was measured."""
PARTS: dict[str, type] = {
    "base": dict, "shape": dict, "gate": dict, "training": dict, "conventions": dict, "storage": str,
    "tensors_sha256": str,
}  # fmt: skip
"""What every config of the present format holds, beside `memory` (null or a mapping) and `versions`."""


def _from_1(config: dict[str, Any]) -> dict[str, Any]:
    """Format 1 stored tensors as they were and did not say when a score is read; it was as it is now."""
    return {**config, "conventions": config.get("conventions") or {}, "storage": "float32"}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
"""From each older version to the next."""


def present(config: Any, folder: Path) -> dict[str, Any]:
    """A config as the present format has it.

    Raises:
        ValueError: for a newer format, or a part that is missing or of another kind.
    """
    version = config.get("format_version") if isinstance(config, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"expected a gate artefact of format {FORMAT_VERSION} or older in {folder}, got {shown(version)}; "
            "update retention"
        )
    unsigned = version == 1 and "tensors_sha256" not in config  # the first ones were written without
    for older in range(version, FORMAT_VERSION):
        config = UPGRADES[older](config)
    for part, kind in PARTS.items():
        if part not in config and not (unsigned and part == "tensors_sha256"):
            raise ValueError(f"the gate artefact in {folder} is damaged ({CONFIG} lacks {part}); export it again")
        if part in config and not isinstance(config[part], kind):
            raise ValueError(
                f"the gate artefact in {folder} is damaged ({part} in {CONFIG} is no {kind.__name__}); export it again"
            )
    if not isinstance(config.get("memory"), dict | None):
        raise ValueError(f"the gate artefact in {folder} is damaged (memory in {CONFIG} is no dict); export it again")
    return config
