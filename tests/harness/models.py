"""A tiny text model in the hub's layout, and what the tests of both harnesses ask of it."""

import random
import tempfile
from functools import lru_cache
from pathlib import Path

from retention.data.example import Example, Segment, Turn
from tests import hub, zoo

_folder = tempfile.TemporaryDirectory()


@lru_cache
def saved_text() -> Path:
    """Checkpoint of a text model with a tokenizer of bytes and a chat template."""
    folder = Path(_folder.name) / "text"
    model = zoo.TEXT["qwen2"](vocab_size=hub.VOCAB)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer = hub.tokenizer({})
    tokenizer.chat_template = hub.TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def words(count, seed=0):
    """So many words of a small vocabulary."""
    draw = random.Random(seed)
    return " ".join(draw.choice(["red", "green", "blue", "one", "two", "three", "cat", "dog"]) for _ in range(count))


def examples(count=3):
    """Contexts to be continued, each with a question, as the native runner takes them."""
    found = []
    for i in range(count):
        asked = Turn(f" {words(3, seed=50 + i)}:", "red", scorer="exact", max_new_tokens=8)
        context = Segment("text", words(12 + i, seed=i))
        found.append(Example(f"shared-{i}", [context], [asked], "after", {"chance": 0.0}, plain=True))
    return found
