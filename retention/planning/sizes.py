"""What a config tells of a model's cache: which layers hold what, for how many bytes, and what the weights take."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention.models.family import config_shape, layer_kinds
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
    """Bytes of all parameters; None where transformers has no class for the config."""

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
        config = _read(Path(source)) if isinstance(source, str | Path) else source
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    found = dtype or (getattr(torch, own) if isinstance(own, str) else own)
    text = config.get_text_config()
    _check(text)
    kinds = tuple(layer_kinds(config))
    known = (FULL, *WINDOWED, LINEAR)
    strange = next((kind for kind in kinds if kind not in known), None)
    if strange is not None:
        raise ValueError(f"expected layers among {', '.join(known)}, got {strange!r}, whose state is not known here")
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0
    return Sizes(
        shape=config_shape(config),
        kinds=kinds,
        element=found.itemsize,
        window=window,
        state=_linear_state(text) * found.itemsize if LINEAR in kinds else 0,
        weights=_parameters(config) * found.itemsize if weights is None and _factory(config) else weights,
    )


def _read(file: Path) -> Any:
    """The config of a JSON file; nothing is looked up elsewhere."""
    from transformers import CONFIG_MAPPING

    file = file / "config.json" if file.is_dir() else file
    try:
        told = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a config.json or its folder, {file} is none ({type(error).__name__})") from error
    kind = told.get("model_type") if isinstance(told, dict) else None
    if kind is None or kind not in CONFIG_MAPPING:
        raise ValueError(f"expected a model_type that transformers knows in {file}, got {kind!r}")
    return CONFIG_MAPPING[kind].from_dict(told)


def _check(text: Any) -> None:
    """Refuse caches that are something else than keys and values of equal heads.

    Raises:
        ValueError: with the reason.
    """
    if getattr(text, "kv_lora_rank", None) is not None:
        raise ValueError(
            "expected keys and values by head, got multi-head latent attention (kv_lora_rank): its latent is one for all "
            "heads, so heads cannot be evicted apart, and nothing here plans or evicts it"
        )
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"):
        if not isinstance(getattr(text, name, None), int):
            raise ValueError(f"expected one number {name} in the config, got {getattr(text, name, None)!r}")


def _linear_state(text: Any) -> int:
    """Numbers in one sequence's state of a gated delta rule layer: the last inputs of its convolution, one matrix a head.

    Raises:
        ValueError: for linear layers of another kind.
    """
    names = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
    given: list[Any] = [getattr(text, f"linear_{name}", None) for name in names]
    if None in given:
        raise ValueError("expected linear layers of the gated delta rule (linear_num_value_heads, ...), got others")
    key, value, keys, values, kernel = given
    return (2 * keys * key + values * value) * kernel + values * key * value


def _factory(config: Any) -> Any:
    """Transformers' factory of models of the config; None where it has none."""
    import transformers as hub

    if type(config) in hub.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return hub.AutoModelForImageTextToText
    return hub.AutoModelForCausalLM if type(config) in hub.MODEL_FOR_CAUSAL_LM_MAPPING else None


def _parameters(config: Any) -> int:
    """Parameters of the model a config describes, tied ones once, built without memory."""
    with torch.device("meta"):
        model = _factory(config).from_config(config)
    return sum(x.numel() for x in model.parameters())
