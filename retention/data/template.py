"""How a processor's chat template writes messages, whatever it knows of parts, templates and special tokens."""

from collections.abc import Sequence
from typing import Any

MARKS = ("\u2402first\u2402", "\u2402answer\u2402", "\u2402next\u2402")
"""Texts that no data holds, to find in what a template writes the places where they were put."""


class Template:
    """A processor's, or a text model's tokenizer's, chat template and what text needs before it is tokenized."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        )
        self._strings = self._takes_strings()

    @property
    def text_only(self) -> bool:
        """Whether there is no processor of images around the tokenizer."""
        return self.processor is self.tokenizer

    def write(self, messages: Sequence[dict[str, Any]], *, prompt: bool) -> str:
        """Messages as the chat template writes them; a text model's get plain strings, one without a template lines."""
        if self._strings:
            joined = ["".join(part["text"] for part in message["content"]) for message in messages]
            if self.tokenizer.chat_template is None:
                return "\n".join([*joined, *[""] * prompt])
            messages = [{**message, "content": text} for message, text in zip(messages, joined, strict=True)]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _takes_strings(self) -> bool:
        """Whether messages have to be strings: in text models whose template knows no parts, or that have none."""
        if not self.text_only:
            return False
        if self.tokenizer.chat_template is None:
            return True
        message = {"role": "user", "content": [{"type": "text", "text": MARKS[0]}]}
        try:
            text: str = self.processor.apply_chat_template([message], tokenize=False)
        except Exception:  # a template may fail in any way on what it does not expect
            return True
        return "'type'" in text or MARKS[0] not in text

    def ids(self, text: str) -> list[int]:
        """Tokens of a text in the midst of a sequence."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def adds_special(self, text: str) -> bool:
        """Whether the tokenizer has to add the special tokens that begin a sequence: the template has not."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
