"""What a config tells of a model's cache: which layers hold what, for how many bytes, and what the weights take."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention.checkpoint import shown
from retention.models.family import config_shape, layer_kinds
from retention.planning.configs import check, config_of
from retention.types import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    Source = PreTrainedModel | PreTrainedConfig | Path | str

FULL = "full_attention"
WINDOWED = ("sliding_attention", "chunked_attention")
LINEAR = "linear_attention"


@dataclass(frozen=True)
class Sizes:
    """A decoder, as far as its cache is concerned."""

    shape: ModelShape
    kinds: tuple[str, ...]
    """Of every layer."""
    element: int
    """Bytes of a number in keys and values."""
    window: int
    """Tokens that layers with a window hold; 0 where there are none."""
    state: int
    """Bytes of one sequence's state in a linear layer; 0 where there are none."""
    weights: int | None
    """Bytes of all parameters; None where a config alone does not tell them: it is quantised, or transformers builds none."""

    @property
    def entry(self) -> int:
        """Bytes of one key and value of one head."""
        return 2 * self.shape.head_dim * self.element

    def count(self, kind: str) -> int:
        """How many layers are of a kind."""
        return self.kinds.count(kind)

    def outside(self, kind: str, tokens: int) -> int:
        """Bytes of one sequence in a layer that is never evicted, holding the last `tokens` of it at most."""
        if kind == LINEAR:
            return self.state
        return min(tokens, self.window) * self.shape.num_kv_heads * self.entry


def sizes_of(source: "Source", dtype: torch.dtype | None = None) -> Sizes:
    """Sizes of a model, a config, or a `config.json` (or the folder it lies in); keys and values are of `dtype`.

    By default that is the model's or the config's own, fp32 where it names none.

    Raises:
        ValueError: for what is none of these, or a cache that is not made of keys and values by head.
    """
    from transformers import PreTrainedModel

    weights = None
    if isinstance(source, PreTrainedModel):
        config, own = source.config, source.dtype
        weights = sum(x.numel() * x.element_size() for x in source.parameters())
    else:
        config = config_of(Path(source)) if isinstance(source, str | Path) else source
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    found = dtype or (getattr(torch, own, None) if isinstance(own, str) else own)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"expected a dtype of torch in the config, got {shown(own)}; name one (--dtype)")
    text = config.get_text_config()
    check(config)
    kinds = tuple(layer_kinds(config))
    known = (FULL, *WINDOWED, LINEAR)
    strange = next((kind for kind in kinds if kind not in known), None)
    if strange is not None:
        raise ValueError(f"expected layers among {', '.join(known)}, got {strange!r}, whose state is not known here")
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0
    if window < 1 and set(kinds) & set(WINDOWED):
        raise ValueError(f"expected a sliding_window or attention_chunk_size above 0 in the config, got {window}")
    return Sizes(
        shape=config_shape(config),
        kinds=kinds,
        element=found.itemsize,
        window=window,
        state=_linear_state(text) * found.itemsize if LINEAR in kinds else 0,
        weights=_weights(config, found.itemsize) if weights is None else weights,
    )


def _linear_state(text: Any) -> int:
    """Numbers in one sequence's state of a gated delta rule layer: the last inputs of its convolution, one matrix a head.

    Raises:
        ValueError: for linear layers of another kind.
    """
    names = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
    given: list[Any] = [getattr(text, f"linear_{name}", None) for name in names]
    if not all(type(x) is int and x > 0 for x in given):
        raise ValueError("expected linear layers of the gated delta rule (linear_num_value_heads, ...), got others")
    key, value, keys, values, kernel = given
    return (2 * keys * key + values * value) * kernel + values * key * value


def _factory(config: Any) -> Any:
    """Transformers' factory of models of the config; None where it has none."""
    import transformers as hub

    if type(config) in hub.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return hub.AutoModelForImageTextToText
    return hub.AutoModelForCausalLM if type(config) in hub.MODEL_FOR_CAUSAL_LM_MAPPING else None


def _weights(config: Any, element: int) -> int | None:
    """Bytes of the model a config describes, tied parameters once, built without memory; None where that is not told."""
    factory = _factory(config)
    if factory is None or getattr(config, "quantization_config", None) is not None:
        return None
    try:
        with torch.device("meta"):
            model = factory.from_config(config)
    except Exception:  # a family may fail in any way on what it was not tried with; its cache is planned all the same
        return None
    return element * sum(x.numel() for x in model.parameters())
