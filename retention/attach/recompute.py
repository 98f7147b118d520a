"""Activation checkpointing that works with what is attached: a layer keeps its input and is run again in the backward."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from retention.models.family import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def recomputing(model: "PreTrainedModel", *, active: bool = True) -> Iterator[None]:
    """Inside, each decoder layer holds only its input for the backward; on exit the model is exactly as before.

    The model may stay in eval mode. Hooks on a layer's attention run twice, so what they do must not depend on how
    often.
    """
    with ExitStack() as stack:
        for layer in decoder_of(model).layers if active else ():
            own: Any = vars(layer).get("forward")
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            stack.callback(setattr if own is not None else delattr, layer, "forward", *([] if own is None else [own]))
        yield
