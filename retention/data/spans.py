"""Where the answers of a chat lie: characters of what its template writes, then tokens of what the processor makes."""

from collections.abc import Collection, Sequence
from typing import Any

from retention.data.media import BadRow
from retention.data.template import MARKS, Template

Span = tuple[int, int]
_CONTEXT = (16, 8, 3)
"""Tokens before an answer by which it is found among those that images were made into; fewer where an image is near."""


def written(template: Template, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
    """A chat as the template writes it, and the characters of its assistant's answers.

    Every answer is put between marks and these are looked for, so that it does not matter what else a template writes.

    Raises:
        BadRow: where the template fails, or changes an answer.
    """
    open_, close = MARKS[1:]
    marked = [
        {**m, "content": [{"type": "text", "text": f"{open_}{m['content'][0]['text']}{close}"}]}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]
    try:
        text, found = template.write(messages, prompt=False), template.write(marked, prompt=False)
    except Exception as error:  # templates raise what they like, e.g. where roles do not take turns
        raise BadRow("refused by the chat template", str(error)) from error
    spans: list[Span] = []
    pieces = found.split(open_)
    plain = pieces[0]
    for piece in pieces[1:]:
        answer, _, rest = piece.partition(close)
        spans.append((len(plain), len(plain) + len(answer)))
        plain += answer + rest
    if plain != text or len(spans) != sum(m["role"] == "assistant" for m in messages):
        raise BadRow("refused by the chat template", "it rewrites an answer")
    return text, spans


def token_spans(
    template: Template, text: str, spans: Sequence[Span], ids: Sequence[int], visual: Collection[int]
) -> list[Span]:
    """Tokens of stretches of a text, each with the special token that ends it, if one does.

    Args:
        template: the processor's.
        text: as the template writes it.
        spans: characters in it.
        ids: tokens of the text, its images made into as many as they take.
        visual: ids of visual tokens, which end no answer.

    Raises:
        BadRow: where a stretch is not found among the tokens.
    """
    own, places = _tokenized(template, text, spans)
    ends = set(template.tokenizer.all_special_ids) - set(visual) - {template.tokenizer.bos_token_id}
    found: list[Span] = []
    cursor, before = 0, 0
    for first, last in places:
        start = first if list(ids) == own else _search(own, (first, last), ids, cursor, before)
        end = start + last - first
        end += end < len(ids) and ids[end] in ends
        found.append((start, end))
        cursor, before = end, last
    return found


def _tokenized(template: Template, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Tokens of the text before images take their place, and which of them lie in each stretch."""
    tokenizer, special = template.tokenizer, template.adds_special(text)
    if not getattr(tokenizer, "is_fast", False):

        def ids(end: int | None) -> list[int]:
            return tokenizer(text[:end], add_special_tokens=special)["input_ids"]

        return ids(None), [(len(ids(start)), len(ids(end))) for start, end in spans]
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets: list[Span] = encoded["offset_mapping"]
    places, token = [], 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < end:
            token += 1
        places.append((first, token))
    return encoded["input_ids"], places


def _search(own: list[int], place: Span, ids: Sequence[int], cursor: int, before: int) -> int:
    """Where tokens of the text lie among all: after the last answer, behind the same tokens as there."""
    first, last = place
    for context in _CONTEXT:
        left = max(first - context, before)
        window = own[left : last + 1]
        for start in range(cursor, len(ids) - len(window) + 1):
            if ids[start] == window[0] and list(ids[start : start + len(window)]) == window:
                return start + first - left
    raise BadRow("answer not found", "among the tokens that the processor makes of the row")
