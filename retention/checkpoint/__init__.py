"""The gate artefact on disk: JSON config, safetensors, model card. The only place that reads or writes one."""

from retention.checkpoint.format import CARD, CONFIG, FILES, FORMAT_VERSION, PICTURE, TENSORS
from retention.checkpoint.reading import Artefact, read
from retention.checkpoint.storage import STORAGES
from retention.checkpoint.text import parsed
from retention.checkpoint.values import shown, typed
from retention.checkpoint.writing import write

__all__ = [
    "CARD", "CONFIG", "FILES", "FORMAT_VERSION", "PICTURE", "STORAGES", "TENSORS", "Artefact", "parsed", "read", "shown",
    "typed", "write",
]  # fmt: skip
