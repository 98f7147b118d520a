"""The gate artefact on disk: JSON config, safetensors, model card. The only place that reads or writes one."""

from retention.checkpoint.format import CARD, CONFIG, FORMAT_VERSION, TENSORS
from retention.checkpoint.reading import Artefact, read
from retention.checkpoint.storage import STORAGES
from retention.checkpoint.values import shown, typed
from retention.checkpoint.writing import write

__all__ = ["CARD", "CONFIG", "FORMAT_VERSION", "STORAGES", "TENSORS", "Artefact", "read", "shown", "typed", "write"]
