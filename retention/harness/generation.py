"""What a harness's arguments of generation mean."""

from collections.abc import Mapping
from typing import Any

from retention.serving.decoding import Decoding

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the longest answer, the first that is given counts."""
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "top_k": None, "use_cache": True}
"""Arguments that may be given where they change nothing, with the values that do not."""
OTHERS = ("image_aspect_ratio",)
"""Arguments for other models, about what a processor here does by itself."""


def decoding_of(told: Mapping[str, Any], longest: int) -> Decoding:
    """How answers are written: greedy unless `do_sample`, or a temperature without it, says otherwise.

    Args:
        told: until, max_gen_toks or another name of it, do_sample, temperature, top_p.
        longest: tokens of an answer where `told` does not say.

    Raises:
        ValueError: for an argument that would change answers and cannot be followed.
    """
    given = {name: value for name, value in told.items() if value is not None and name not in OTHERS}
    until, limits = given.pop("until", []), [given.pop(name, None) for name in LENGTHS]
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    tokens = next((limit for limit in limits if limit is not None), longest)
    temperature, top_p = float(given.pop("temperature", 0.0)), float(given.pop("top_p", 1.0)) or 1.0
    samples = given.pop("do_sample", temperature > 0)
    for name, value in given.items():
        if name not in NEUTRAL or value != NEUTRAL[name]:
            raise ValueError(
                f"expected until, max_gen_toks, do_sample, temperature and top_p to steer answers, got {name}={value}"
            )
    if samples:
        return Decoding(int(tokens), temperature or 1.0, top_p, stop=stop)
    return Decoding(int(tokens), stop=stop)
