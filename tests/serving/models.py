"""Pipelines on tiny models: a text one and those that see, with budgets far below what is said."""

from functools import lru_cache

from retention.serving.pipeline import pipeline
from tests import hub, zoo


@lru_cache
def text_model():
    return zoo.TEXT["qwen2"](vocab_size=hub.VOCAB).eval(), hub.tokenizer({})


def opened(name="qwen2", **changes):
    """Twelve entries per head, and at most sixteen more while an answer is written."""
    model, processor = text_model() if name == "qwen2" else zoo.loaded(name)
    task = "text-generation" if name == "qwen2" else "image-text-to-text"
    return pipeline(task, model=model, processor=processor, **({"policy": "keydiff", "budget": 12} | changes))


def seen(words, *pictures):
    """A message with pictures before its words."""
    images = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": words}]}]
