"""One tiny model of every family, and padded batches of prompts for it: vision-language ones through their processors."""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import hub, tiny
from tests.cache.helpers import left_padded, tokens

TEXT = {
    "gemma2": tiny.tiny_gemma2,
    "gemma3_text": tiny.tiny_gemma3,
    "llama": tiny.tiny_llama,
    "mistral": tiny.tiny_mistral,
    "phi3": tiny.tiny_phi3,
    "qwen2": tiny.tiny_qwen2,
    "qwen3": tiny.tiny_qwen3,
    "qwen3_moe": tiny.tiny_qwen3_moe,
    "qwen3_next": tiny.tiny_qwen3_next,
}
EVERY = [*TEXT, *hub.HUB]
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
_folder = tempfile.TemporaryDirectory()


@lru_cache
def saved(name: str) -> Path:
    """The family's checkpoint in the hub's layout."""
    folder = Path(_folder.name) / name
    if name in TEXT:
        TEXT[name]().save_pretrained(folder)
        hub.tokenizer({}).save_pretrained(folder)
    else:
        hub.save(name, folder)
    return folder


@lru_cache
def loaded(name: str) -> tuple[Any, Any]:
    """Model and processor as a user loads them."""
    from retention.models.load import load_frozen

    return load_frozen(str(saved(name)), device="cpu")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


SIZES = [[(16, 16), (24, 32)], [(32, 20)]]
"""Images of each row: their heights and widths."""


def batch(name: str, *, images: bool = False) -> dict[str, Tensor]:
    """Two prompts of different lengths, left-padded; with images two of different sizes, and one."""
    if name in TEXT:
        ids, mask = left_padded(tokens(2, 30, seed=1), [30, 21])
        return {"input_ids": ids, "attention_mask": mask}
    _, processor = loaded(name)
    mark = hub.HUB[name].image if images else ""
    text = [f"A cat {mark} or a dog {mark} here?", f"{mark} What?"]
    given: dict[str, Any] = {"text": text, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    if images:
        given["images"] = [[picture(*size, seed=i) for i, size in enumerate(row, 3 * r)] for r, row in enumerate(SIZES)]
    return dict(processor(**given))


def following(name: str, mask: Tensor, new: int, deltas: Tensor | None = None) -> dict[str, Tensor]:
    """Mask and positions of the next `new` tokens; three-axis positions lie `deltas` behind the sequence's."""
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    places = (mask.cumsum(1) - 1)[:, -new:] + (0 if deltas is None else deltas)
    return {"attention_mask": mask, "position_ids": places.expand(3, -1, -1) if name in MROPE else places}


def positioned(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A first prompt with explicit positions where the model would count padding; it finds three-axis ones itself."""
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if name not in MROPE:
        return inputs | {"position_ids": places}
    return inputs if "image_grid_thw" in inputs else inputs | {"position_ids": places.expand(3, -1, -1)}
