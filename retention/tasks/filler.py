"""Text that says nothing about any question, worded in the embedded model's vocabulary or in English."""

import numpy as np

from retention.embedded import DECOYS
from retention.tasks.base import SPLITS
from retention.tasks.scene import STYLES, TINTS

WORDS = [*(f"<ground{i}>" for i in range(STYLES * TINTS)), *(f"<decoy{i}>" for i in range(len(DECOYS)))]
WHO = {
    "train": ("The gardener", "A young baker", "My neighbour", "The old sailor"),
    "val": ("The postman", "A quiet tailor", "My cousin", "The tall miller"),
    "test": ("The carpenter", "A tired painter", "My uncle", "The shy potter"),
}
DOES = ("waters the roses", "sweeps the yard", "mends a chair", "counts the clouds", "hums a tune", "waits for rain")
WHERE = ("behind the barn", "near the river", "under the bridge", "beside the mill", "in front of the inn")


def filler(rng: np.random.Generator, split: str, n_words: int, style: str) -> list[str]:
    """Single words (symbolic) or whole sentences (natural) of about `n_words` words; no word or subject is in two splits."""
    part = SPLITS.index(split)
    if style == "symbolic":
        own = WORDS[part :: len(SPLITS)]
        return [own[int(i)] for i in rng.integers(len(own), size=n_words)]
    sentences: list[str] = []
    while sum(len(sentence.split()) for sentence in sentences) < n_words:
        chosen = (words[int(rng.integers(len(words)))] for words in (WHO[split], DOES, WHERE))
        sentences.append(" ".join(chosen) + ".")
    return sentences
