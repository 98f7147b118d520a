"""The length of a context in words, where no tokenizer is at hand."""

import re

from retention.data.example import Example


def words_of(example: Example) -> int:
    """Words and punctuation marks of a context and its first question; `<word>` of the embedded vocabulary is one."""
    texts = [*(segment.payload for segment in example.segments), example.turns[0].question]
    return sum(len(re.findall(r"<\w+>|\w+|[^\w\s]", text)) for text in texts)
