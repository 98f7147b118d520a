"""kvpress's side of scripts/check_press.py: what an exported press scores and keeps on one prompt.

Runs inside kvpress's own environment and imports no `retention`; the press comes from the exported folder.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from kvpress_worker import Side, serve_pipes
from published_worker import Noted
from safetensors.torch import load_file, save_file
from torch import Tensor


def load_model(folder: Path) -> Any:
    """The model of a work folder by its config's type, fp32, SDPA."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval().requires_grad_(False)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model


def evicted(model: Any, ids: Tensor, press: Any) -> Any:
    """The stock cache after a prompt inside a press."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with press(model):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


class Exported(Side):
    """Answers requests about exported presses."""

    answers = ("versions", "run")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @torch.no_grad()
    def run(self, model: str, press: str, share: float, file: str) -> dict:
        """Scores and kept entries, noted without evicting; then the press as users run it, and what the cache holds."""
        folder = self.folder / press
        sys.path.insert(0, str(folder))
        sys.modules.pop("retention_press", None)
        from retention_press import RetentionPress

        sys.path.remove(str(folder))
        net, ids = load_model(self.folder / model), load_file(self.folder / model / "ids.safetensors")["ids"]
        noting = RetentionPress(compression_ratio=share)
        noted = Noted(noting)
        evicted(net, ids, noting)
        found = {"scores": torch.stack(noted.scores), "kept": torch.stack(noted.kept)}
        cache = evicted(net, ids, RetentionPress(compression_ratio=share))
        save_file(found, self.folder / file)
        return {"held": [layer.keys.shape[2] for layer in cache.layers]}


if __name__ == "__main__":
    serve_pipes(Exported(Path(sys.argv[1])))
