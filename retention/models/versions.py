"""What changed between the versions of transformers that the package admits, and nothing else."""

from transformers.cache_utils import CacheLayerMixin


class GrowingLayer(CacheLayerMixin):
    """A cache layer without a maximum, under every name that asked for one."""

    is_sliding = False

    def get_max_length(self) -> int:
        """No maximum (from 5.13 on)."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (before)."""
        return -1
