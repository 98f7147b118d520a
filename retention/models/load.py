"""Load a frozen base and its processor: the embedded one, a folder, or a hub id."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention import embedded
from retention.models import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "embedded"


@dataclass
class ModelConfig:
    """Which frozen base, and how it is loaded."""

    name: str = EMBEDDED
    """`embedded`, a folder, or a hub id."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    prompt_style: str = "symbolic"
    """How tasks are worded: symbolic (the embedded model's closed vocabulary) or natural (English)."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"expected model.dtype float32, bfloat16 or float16, got {self.dtype!r}")
        if self.prompt_style not in ("symbolic", "natural"):
            raise ValueError(f"expected model.prompt_style symbolic or natural, got {self.prompt_style!r}")
        if not self.name:
            raise ValueError(
                "expected model.name to be a hub id or a folder, got nothing; e.g. model.name=llava-hf/llava-1.5-7b-hf"
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
    name: str = EMBEDDED, *, dtype: torch.dtype = torch.float32, device: str = "auto", revision: str | None = None
) -> tuple["PreTrainedModel", Any]:
    """Model in eval mode without gradients, and its processor (tokenizer for text-only models).

    Raises:
        ValueError: when the model cannot be found, or its architecture is not supported.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    source = str(embedded.path()) if name == EMBEDDED else name
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        where = "a folder" if Path(source).exists() else "neither a folder here nor reachable on the hub"
        raise ValueError(f"cannot load a model from {name!r} ({where}): {str(error).splitlines()[0]}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"expected a model of a supported family ({', '.join(sorted(FAMILIES))}), got {config.model_type!r} from {name!r}"
        )
    visual = bool(FAMILIES[config.model_type].visual_token_attributes)
    factory = AutoModelForImageTextToText if visual else AutoModelForCausalLM
    model: Any = factory.from_pretrained(source, dtype=dtype, revision=revision)
    model.to(pick_device(device))
    model.config.name_or_path = EMBEDDED if name == EMBEDDED else name
    processor = (AutoProcessor if visual else AutoTokenizer).from_pretrained(source, revision=revision)
    return model.eval().requires_grad_(False), processor


def load_configured(config: ModelConfig) -> tuple["PreTrainedModel", Any]:
    """`load_frozen` with the values of a config."""
    return load_frozen(config.name, dtype=config.torch_dtype, device=config.device, revision=config.revision)
