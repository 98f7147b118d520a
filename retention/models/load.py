"""Load a frozen base and its processor: the embedded one, a folder, or a hub id; quantised, or with an adapter."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention import embedded
from retention.models.processors import load_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "embedded"
QUANTIZATIONS = ("none", "8bit", "4bit")
ADAPTERS = ("merged", "attached")


@dataclass
class ModelConfig:
    """Which frozen base, and how it is loaded."""

    name: str = EMBEDDED
    """`embedded`, a folder, or a hub id; also of a PEFT adapter, which names its base."""
    dtype: str = "float32"
    """float32, bfloat16 or float16; of what is not quantised."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    device_map: str | None = None
    """Instead of a device: auto, where parts that do not fit are kept in main memory or on disk (needs accelerate)."""
    quantization: str = "none"
    """none, 8bit or 4bit (needs bitsandbytes): how the base's linear layers are held."""
    adapter: str | None = None
    """Folder or hub id of a PEFT adapter on the base."""
    adapter_mode: str = "merged"
    """merged into the base's weights, or attached beside them (the only way for a quantised base)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    prompt_style: str = "symbolic"
    """How tasks are worded: symbolic (the embedded model's closed vocabulary) or natural (English)."""

    def __post_init__(self) -> None:
        choices = {
            "dtype": ("float32", "bfloat16", "float16"),
            "prompt_style": ("symbolic", "natural"),
            "quantization": QUANTIZATIONS,
            "adapter_mode": ADAPTERS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"expected model.{name} {', '.join(known[:-1])} or {known[-1]}, got {getattr(self, name)!r}"
                )
        if not self.name:
            raise ValueError(
                "expected model.name to be a hub id or a folder, got nothing; e.g. model.name=llava-hf/llava-1.5-7b-hf"
            )
        if self.quantization != "none" and self.adapter is not None and self.adapter_mode == "merged":
            raise ValueError(
                "an adapter cannot be merged into a quantised base without loss; set model.adapter_mode=attached"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return getattr(torch, self.dtype)


def pick_device(name: str) -> torch.device:
    """`auto` means the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_frozen(
    name: str = EMBEDDED,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization: str = "none",
    adapter: str | None = None,
    adapter_mode: str = "merged",
    revision: str | None = None,
) -> tuple["PreTrainedModel", Any]:
    """Model in eval mode without gradients, and its processor (tokenizer for text-only models).

    Arguments as in `ModelConfig`; `device_map` may also be accelerate's own table.

    Raises:
        ValueError: when the model cannot be found, or a package it needs is missing.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    source = str(embedded.path()) if name == EMBEDDED else name
    if adapter is None and (base := _base_of(source, revision)) is not None:
        source, adapter, revision = base, source, None
    config = _config(source, name, revision)
    visual = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")
    placed: dict[str, Any] = {"device_map": device_map}
    if quantization != "none":
        placed = {"quantization_config": _quantized(quantization, dtype), "device_map": device_map or str(pick_device(device))}  # fmt: skip
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        placed["attn_implementation"] = "eager"  # some versions would leave the cap out of fused attention in silence
    factory = AutoModelForImageTextToText if visual else AutoModelForCausalLM
    told: dict[str, Any] = {"dtype": dtype, "revision": revision, "output_loading_info": True, **placed}
    model, found = _needing("accelerate", factory.from_pretrained, source, **told)
    _check_whole(name, found)
    if device_map is None and quantization == "none":
        model.to(pick_device(device))
    if adapter is not None:
        model = _adapted(model, adapter, adapter_mode)
    model.config.name_or_path = (name if adapter is None or adapter == name else f"{name} with {adapter}")  # fmt: skip
    processor = _processor(source, visual, config.model_type, revision)
    return model.eval().requires_grad_(False), processor


def _check_whole(name: str, found: Any) -> None:
    """Refuse a checkpoint that lacks weights of the model, which would start at random numbers.

    Raises:
        ValueError: naming how many, and one of them.
    """
    missing = sorted(str(key) for key in found["missing_keys"])
    if missing:
        raise ValueError(
            f"the checkpoint {name!r} lacks {len(missing)} of the model's weights, e.g. {missing[0]}, which would be random; "
            "check that it is whole, or that this transformers knows its names"
        )


def _processor(source: str, visual: bool, model_type: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    if visual:
        return load_processor(source, model_type, revision)
    return AutoTokenizer.from_pretrained(source, revision=revision)


def _config(source: str, name: str, revision: str | None) -> Any:
    """The config of a checkpoint, or a sentence that says where none was found."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        where = "a folder" if Path(source).exists() else "neither a folder here nor reachable on the hub"
        raise ValueError(f"cannot load a model from {name!r} ({where}): {str(error).splitlines()[0]}") from error


def _base_of(source: str, revision: str | None) -> str | None:
    """The base that a folder or hub id of an adapter names; None for a model of its own."""
    from transformers.utils.hub import cached_file

    given: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        if cached_file(source, "config.json", **given) is not None:
            return None
        found = cached_file(source, "adapter_config.json", **given)
    except OSError:
        return None
    if found is None:
        return None
    base: str = json.loads(Path(found).read_text())["base_model_name_or_path"]
    return str(embedded.path()) if base == EMBEDDED else base


def _quantized(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _adapted(model: Any, adapter: str, mode: str) -> Any:
    """The model with a PEFT adapter, of the same class as before."""
    if mode == "attached":
        _needing("peft", model.load_adapter, adapter)
        return model

    def merged() -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, adapter).merge_and_unload()

    return _needing("peft", merged)


def _needing(package: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call it; a missing package is named with the extra that brings it."""
    extras = {"accelerate": "quantized", "bitsandbytes": "quantized", "peft": "peft"}
    try:
        return function(*args, **kwargs)
    except ImportError as error:
        missing = next((name for name in extras if name in str(error).lower()), package)
        raise ValueError(
            f"loading this model needs the package {missing}; install it with pip install 'retention[{extras[missing]}]'"
        ) from error


def load_configured(config: ModelConfig) -> tuple["PreTrainedModel", Any]:
    """`load_frozen` with the values of a config."""
    return load_frozen(
        config.name,
        dtype=config.torch_dtype,
        device=config.device,
        device_map=config.device_map,
        quantization=config.quantization,
        adapter=config.adapter,
        adapter_mode=config.adapter_mode,
        revision=config.revision,
    )
