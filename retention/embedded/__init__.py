"""The shipped tiny vision-language model and the picture sheets its tasks are drawn from.

The weights come from `scripts/pretrain_embedded_vlm.py`, the sheets from `scripts/draw_embedded_images.py`;
the package only reads them.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

FOLDER = Path(__file__).parent
IMAGES = FOLDER / "images"
WEIGHTS = FOLDER / "weights"
SHEET_COLUMNS = 60
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DECOYS = "#$%&*+=?@!<>"
SPLIT_SIZES = {"train": 1197, "val": 150, "test": 450}


def path() -> Path:
    """Folder with the embedded model and processor, as `from_pretrained` expects it."""
    return WEIGHTS


def load_model() -> "PreTrainedModel":
    """The embedded LLaVA (SigLIP tower, Qwen3 decoder), fp32."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(WEIGHTS)


def load_processor() -> "ProcessorMixin":
    """The embedded model's processor: PIL image processor and word-level tokenizer."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(WEIGHTS)


@cache
def _tiles(name: str) -> np.ndarray:
    from PIL import Image

    sheet = np.asarray(Image.open(IMAGES / name))
    rows = sheet.shape[0] // 8
    return sheet.reshape(rows, 8, SHEET_COLUMNS, 8).transpose(0, 2, 1, 3).reshape(-1, 8, 8)


@cache
def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digit scans of one split: (uint8 [n, 8, 8], labels int64 [n]).

    The split is a fixed permutation (seed 0) of scikit-learn's 1,797 scans: no scan of one split is ever
    drawn in another.

    Raises:
        ValueError: for a split other than train, val or test.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"expected a split among {sorted(SPLIT_SIZES)}, got {split!r}")
    labels = np.array([int(c) for c in (IMAGES / "digits.txt").read_text().strip()])
    order = np.random.default_rng(0).permutation(len(labels))
    names = list(SPLIT_SIZES)
    start = sum(SPLIT_SIZES[name] for name in names[: names.index(split)])
    chosen = order[start : start + SPLIT_SIZES[split]]
    return _tiles("digits.png")[chosen], labels[chosen]


def glyphs() -> np.ndarray:
    """Glyph masks, uint8 [len(LETTERS + DECOYS), 8, 8]: the letters of keys, then decoys."""
    return _tiles("glyphs.png")[: len(LETTERS) + len(DECOYS)]
