"""What a chat is to a model: its first prompt, and what later messages add behind an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retention.data.chat import read_chat
from retention.data.media import BadRow, film, opened
from retention.data.template import MARKS, Template

Message = dict[str, Any]


class Prompts:
    """Writes the messages of a processor's, or a text model's tokenizer's, chats."""

    def __init__(self, processor: Any, *, video_frames: int = 8) -> None:
        """`video_frames`: the most frames of a video, which are read as images."""
        self.template, self.video_frames = Template(processor), video_frames

    def read(self, messages: Any) -> tuple[list[Message], list[Any]]:
        """Messages in any common form, or a text alone, as the template takes them, and their images in order.

        Raises:
            ValueError: for messages that cannot be read, or images for a text model.
        """
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        try:
            chat = read_chat({"messages": given}, "messages")
            images = [picture for part in chat.media for picture in self._pictures(part)]
        except BadRow as error:
            raise ValueError(
                f"expected chat messages like [{{'role': 'user', 'content': 'Hi'}}], got {error}"
            ) from error
        if images and self.template.text_only:
            raise ValueError("expected messages without images for a text model, got some; load one that sees")
        return [self._placed(message) for message in chat.messages], images

    def _pictures(self, part: Mapping[str, Any]) -> list[Any]:
        if part["type"] == "video":
            return film(part["video"], self.video_frames).frames
        return [opened(part["image"])]

    def _placed(self, message: Message) -> Message:
        """A message whose images are places."""
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            many = len(self._pictures(part)) if part["type"] == "video" else 1
            content += [part] if part["type"] == "text" else [{"type": "image"}] * many
        return {"role": message["role"], "content": content}

    def first(self, chats: Sequence[Sequence[Message]], images: Sequence[list[Any]]) -> dict[str, Tensor]:
        """Whole chats as one left-padded batch, up to where the answers begin."""
        texts = [self._written(messages) for messages in chats]
        return self._encoded(texts, images, special=self.template.adds_special(texts[0]))

    def following(self, before: Sequence[Message], new: Sequence[Message], images: list[Any]) -> dict[str, Tensor]:
        """What stands between the last answer in `before` and the next one: its end, new messages, the next's begin."""
        marked = {"role": "assistant", "content": [{"type": "text", "text": MARKS[1]}]}
        _, mark, behind = self._written([*before[:-1], marked, *new]).partition(MARKS[1])
        if not mark:
            raise ValueError("the chat template does not write answers as they are, so a conversation cannot go on")
        return self._encoded([behind], [images], special=False)

    def _written(self, messages: Sequence[Message]) -> str:
        try:
            return self.template.write(messages, prompt=True)
        except Exception as error:  # templates raise what they like, e.g. where roles do not take turns
            told = str(error).partition("\n")[0]
            raise ValueError(f"the model's chat template refuses these messages: {told}") from error

    def _encoded(self, texts: list[str], images: Sequence[list[Any]], *, special: bool) -> dict[str, Tensor]:
        given: dict[str, Any] = {"text": texts, "padding": True, "padding_side": "left", "return_tensors": "pt"}
        if any(images):
            given["images"] = [list(row) for row in images]
        made = self.template.processor(add_special_tokens=special, **given)
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}
