"""Activation checkpointing that works with what is attached: a layer keeps its input and is run again in the backward."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from retention.attach.hooks import Attachment, attachment, running
from retention.models.family import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def recomputing(model: "PreTrainedModel", *, active: bool = True) -> Iterator[None]:
    """Inside, each decoder layer holds only its input for the backward; on exit the model is exactly as before.

    To be entered inside the block of an attachment, which hangs itself on the model again while a layer is run again,
    whenever the backward comes. The model may stay in eval mode. Hooks on a layer's attention run twice, so what they
    do must not depend on how often.
    """
    hanging = attachment(model)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _hung(model, hanging)

    with ExitStack() as stack:
        for layer in decoder_of(model).layers if active else ():
            again = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
            stack.enter_context(running(layer, again))
        yield


@contextmanager
def _hung(model: "PreTrainedModel", hanging: Attachment | None) -> Iterator[None]:
    """What hung on the model in the forward hangs on it inside."""
    if hanging is None or attachment(model) is not None:
        yield
        return
    with hanging.again():
        yield
