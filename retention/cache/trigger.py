"""When an eviction runs: after a prompt or each of its chunks, and every so many decoded tokens."""

from dataclasses import dataclass


@dataclass
class Trigger:
    """Fires after every prompt or chunk of one, and while decoding every `evict_every` tokens (never, if null)."""

    evict_every: int | None = None
    since_eviction: int = 0

    def due(self, new_tokens: int, *, prompt: bool) -> bool:
        """Whether to evict after `new_tokens` of a prompt or of decoding; counts tokens since the last time."""
        self.since_eviction += new_tokens
        decoding = self.evict_every is not None and self.since_eviction >= self.evict_every
        if prompt or decoding:
            self.since_eviction = 0
            return True
        return False
