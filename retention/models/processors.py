"""Processors of vision-language models, for images alone where what videos need is not installed."""

from importlib.util import find_spec
from typing import Any

from retention.models.pixtral import PixtralImages

EXTRA = "install it with pip install 'retention[video]'"


def load_processor(source: str, model_type: str, revision: str | None = None) -> Any:
    """The processor of a folder or hub id.

    Without torchvision a processor that also takes videos is put together for images alone.

    Raises:
        ValueError: where a package is missing that the processor needs even for images.
    """
    from transformers import AutoProcessor

    try:
        if find_spec("torchvision") is not None:
            return AutoProcessor.from_pretrained(source, revision=revision)
        return _without_videos(source, model_type, revision)
    except ImportError as error:
        missing = next((name for name in ("num2words", "torchvision") if name in str(error).lower()), None)
        if missing is None:
            raise
        raise ValueError(f"the processor of {source!r} needs the package {missing}; {EXTRA}") from error


def _without_videos(source: str, model_type: str, revision: str | None) -> Any:
    """The processor class of the checkpoint around its image processor and tokenizer."""
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto import processing_auto

    told, _ = transformers.ProcessorMixin.get_processor_dict(source, revision=revision)
    known: dict[str, str] = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"]
    images = AutoImageProcessor.from_pretrained(source, revision=revision)
    name = told.get("processor_class") or getattr(images, "_processor_class", None) or known.get(model_type)
    if name == "PixtralProcessor":
        kind: Any = PixtralImages
    else:
        kind = getattr(transformers, name or "", None)
        if kind is None or "video_processor" not in kind.get_attributes():
            return AutoProcessor.from_pretrained(source, revision=revision)
        kind = _image_only(kind)
    given = {k: v for k, v in told.items() if not k.endswith("_processor") and k not in ("processor_class", "auto_map")}
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if given.get("chat_template") is None:
        given["chat_template"] = tokenizer.chat_template
    return kind(image_processor=images, tokenizer=tokenizer, video_processor=None, **given)


def _image_only(kind: Any) -> Any:
    """A processor class that may lack its video processor, and says so when it is given videos."""
    from transformers import ProcessorMixin

    class ImageOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

        def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
            if videos is not None:
                raise ValueError(f"this processor was loaded for images alone, videos need torchvision; {EXTRA}")
            return super().__call__(images=images, text=text, **kwargs)

        def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
            template = chat_template or self.chat_template  # SmolVLM's own asks its video processor first
            return ProcessorMixin.apply_chat_template(self, conversation, template, **kwargs)

    ImageOnly.__name__ = ImageOnly.__qualname__ = kind.__name__
    return ImageOnly
