"""When an eviction runs: after a prompt or each of its chunks, and every so many decoded tokens."""

from dataclasses import dataclass


@dataclass
class Trigger:
    """Fires after every forward of several tokens, and while decoding every `evict_every` tokens (never, if null)."""

    evict_every: int | None = None
    since_eviction: int = 0

    def due(self, new_tokens: int) -> bool:
        """Whether to evict after a forward of `new_tokens`; counts decoded tokens since the last time."""
        self.since_eviction += new_tokens
        decoding = self.evict_every is not None and self.since_eviction >= self.evict_every
        if new_tokens > 1 or decoding:
            self.since_eviction = 0
            return True
        return False
