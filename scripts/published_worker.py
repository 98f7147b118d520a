"""kvpress's side of scripts/check_published.py: scores and kept entries of its presses on one prompt.

Runs inside kvpress's own environment and imports no `retention`. Every layer is scored on the whole prompt: what a press
would evict is noted and not evicted.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from kvpress_worker import Side, load_model, serve_pipes
from safetensors.torch import load_file, save_file
from torch import Tensor


class Noted:
    """A press whose `compress` is replaced: it notes scores and kept entries of each layer, and keeps everything."""

    def __init__(self, press: Any) -> None:
        self.press, self.original = press, press.compress
        self.scores: list[Tensor] = []
        self.kept: list[Tensor] = []
        press.compress = self

    def __call__(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, rows: Any, given: dict) -> Any:
        """What the press's hook calls after each layer's attention."""
        if hasattr(self.press, "score"):
            self.scores.append(self.press.score(module, hidden, keys, values, rows, given)[0].float().contiguous())
        module.masked_key_indices = None
        kept, _ = self.original(module, hidden, keys, values, rows, given)
        mask = torch.ones(keys.shape[1:3], dtype=torch.bool)
        if module.masked_key_indices is not None:
            mask[module.masked_key_indices[1:]] = False
        else:
            slots = (kept[0, :, :, None] - keys[0, :, None]).abs().amax(-1).argmin(-1)
            mask = torch.zeros_like(mask).scatter(1, slots, True)
        module.masked_key_indices = None
        self.kept.append(mask)
        return keys, values


class Wordless:
    """A tokenizer that knows no words, so that KVzip repeats the prompt without an instruction."""

    chat_template = None

    @classmethod
    def from_pretrained(cls, name: str) -> "Wordless":
        """Itself, whatever the name."""
        return cls()

    def encode(self, text: str, **options: Any) -> Tensor:
        """No ids."""
        return torch.zeros(1, 0, dtype=torch.long)


class NotedKVzip:
    """KVzip decides once, behind its own forwards: notes scores and kept entries there."""

    def __init__(self, press: Any, model: Any) -> None:
        from kvpress.presses import kvzip_press

        kvzip_press.AutoTokenizer = Wordless
        self.press, self.original, self.model = press, press.compress_post, model
        self.scores: list[Tensor] = []
        self.kept: list[Tensor] = []
        press.compress_post = self

    def __call__(self, model: Any) -> None:
        """What the press calls when all scores are there."""
        self.scores = list(self.press.score_val[:, 0].clone())
        self.original(model)
        for layer, scores in zip(model.model.layers, self.scores, strict=True):
            mask = torch.ones(scores.shape, dtype=torch.bool)
            mask[layer.self_attn.masked_key_indices[1:]] = False
            layer.self_attn.masked_key_indices = None
            self.kept.append(mask)


class Published(Side):
    """Answers requests about kvpress's own presses."""

    answers = ("versions", "run")

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, load_model(folder)
        self.ids = load_file(folder / "ids.safetensors")["ids"]

    @torch.no_grad()
    def run(
        self, name: str, share: float, settings: dict, file: str, around: list[str] = (), eager: bool = False
    ) -> dict:
        """One press by its class name, inside others if asked, at the share that it evicts."""
        import kvpress
        from transformers import DynamicCache

        press = getattr(kvpress, name)(compression_ratio=share, **settings)
        for outer in around:
            press = getattr(kvpress, outer)(press)
        self.model.set_attn_implementation("eager" if eager else "sdpa")
        noted = NotedKVzip(press, self.model) if name == "KVzipPress" else Noted(press)
        cache = DynamicCache(config=self.model.config)
        with press(self.model):
            self.model(input_ids=self.ids, past_key_values=cache, use_cache=True)
        found = {"kept": torch.stack(noted.kept)}
        found |= {"scores": torch.stack(noted.scores)} if noted.scores else {}
        save_file(found, self.folder / file)
        return {"kept": [int(x) for x in found["kept"].sum((1, 2))]}


if __name__ == "__main__":
    serve_pipes(Published(Path(sys.argv[1])))
