"""Quota: any policy's choice inside fixed shares per layer and head; a control that tells allocation from scoring."""

from dataclasses import dataclass

from retention.policies.wrapper import Wrapper


@dataclass
class Quota(Wrapper):
    """Ranks as `base` does, under counts per layer and head in proportion to `cache.quota`.

    An evaluation measures the shares on validation contexts: what trained gates keep of each layer and head in one
    global pool, rescaled to the budget. There the name `quota+X` does the same for any X. Elsewhere `cache.quota` is
    the caller's.
    """

    collector = "keys_values"
    allocator = "quota"

    base: str = "keydiff"
    """Name of the policy that ranks."""
