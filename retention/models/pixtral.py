"""Pixtral's processor for images without torchvision, which transformers' own asks for even then.

An image of h x w merged patches becomes h rows of w placeholder tokens, a break after each and an end after the last.
"""

from collections.abc import Sequence
from typing import Any


class PixtralImages:
    """Tokenizer and image processor together, called as transformers' processors are."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **unused: Any,
    ) -> None:
        self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, chat_template
        self.side = patch_size * spatial_merge_size
        self.tokens = image_token, image_break_token, image_end_token

    def __call__(self, text: str | Sequence[str], images: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """Token ids, mask, pixels and sizes of prompts, as a BatchFeature."""
        from transformers import BatchFeature
        from transformers.image_utils import make_flat_list_of_images

        if videos is not None:
            raise ValueError("Pixtral takes no videos; pass images")
        texts, found = [text] if isinstance(text, str) else list(text), {}
        if images is not None:
            flat = make_flat_list_of_images([image for image in images if not isinstance(image, list) or image])
            found = dict(self.image_processor(flat, patch_size=self.side, return_tensors="pt"))
            sizes = iter(found["image_sizes"].tolist())
            texts = [self._placed(one, sizes) for one in texts]
        kwargs.pop("return_mm_token_type_ids", None)
        return BatchFeature({**self.tokenizer(texts, **kwargs), **found})

    def _placed(self, text: str, sizes: Any) -> str:
        """A prompt with the tokens of each image in place of its placeholder."""
        token, brk, end = self.tokens
        first, *others = text.split(token)
        for part in others:
            height, width = next(sizes)
            rows = (token * (width // self.side) + brk) * (height // self.side)
            first += rows.removesuffix(brk) + end + part
        return first

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """The conversation as a prompt."""
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def save_pretrained(self, folder: str) -> None:
        """Tokenizer and image processor."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
