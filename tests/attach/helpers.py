"""What of a model an attachment may not leave changed, and inputs for the three families."""

import types
from typing import Any

import torch
from torch import Tensor

from tests.cache.helpers import left_padded, tokens
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS

FAMILIES = ["llama", "qwen3", "llava"]


def snapshot(model: Any) -> dict[str, Any]:
    """Hooks, attributes and bound methods of every module, attention implementations of every config."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = vars(module)
        found[f"{name}.attributes"] = sorted(attributes)
        found[f"{name}.hooks"] = {
            key: len(value) for key, value in attributes.items() if "hooks" in key and hasattr(value, "__len__")
        }
        found[f"{name}.patched"] = sorted(k for k, v in attributes.items() if isinstance(v, types.FunctionType))
        if hasattr(module, "config"):
            found[f"{name}.attention"] = module.config._attn_implementation
            found[f"{name}.text_attention"] = module.config.get_text_config()._attn_implementation
    return found


def hooks(model: Any) -> int:
    """Hooks on all modules together."""
    return sum(len(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict))


def inputs_of(family: str, lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of prompts; llava's hold one image in every row."""
    ids, mask = left_padded(tokens(len(lengths), max(lengths), seed=seed), lengths)
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "llava":
        ids[:, -IMAGE_TOKENS - 3 : -3] = IMAGE_TOKEN
        generator = torch.Generator().manual_seed(seed)
        batch["pixel_values"] = torch.randn(len(lengths), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return batch


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding."""
    real = batch["attention_mask"][row].bool()
    own = {k: v[row : row + 1] for k, v in batch.items()}
    return own | {k: own[k][:, real] for k in ("input_ids", "attention_mask")}
