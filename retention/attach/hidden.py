"""What a model's head would read: the way into the decoder is gone once, and teacher and student start from there."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retention.attach.facts import Caught, TokenFacts, shape_of, valid_tokens
from retention.attach.hooks import attachment
from retention.attach.packed import apart, documents_of, laid_out
from retention.models import family_of
from retention.models.family import decoder_of
from retention.ops.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Entrance:
    """A batch where its decoder begins: images are encoded, positions are known."""

    arguments: dict[str, Any]
    caught: Caught
    """What the attachments read off the arguments of the whole model."""
    documents: Documents | None = None
    """Where the decoder gets the rows as one."""


class _ReachedError(Exception):
    """The decoder was reached; nothing behind it has to run."""


@torch.no_grad()
def entrance(model: "PreTrainedModel", inputs: dict[str, Tensor]) -> Entrance:
    """Run a model without a cache up to its decoder: the frozen vision tower once, without a graph."""
    facts, found = TokenFacts(family_of(model), model.config), {}

    def reached(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> NoReturn:
        found.update(kwargs)
        raise _ReachedError

    hooks = [model.register_forward_pre_hook(facts.catch, with_kwargs=True)]
    hooks.append(decoder_of(model).register_forward_pre_hook(reached, with_kwargs=True))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    except _ReachedError:
        return Entrance(found, facts.caught)
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError(f"the forward of {type(model).__name__} did not call its decoder")


def packed(model: "PreTrainedModel", start: Entrance) -> Entrance:
    """The same batch as one row of documents without padding, where there is padding.

    Raises:
        ValueError: for a decoder that cannot be held to single documents.
    """
    batch, tokens, device = shape_of(start.arguments)
    documents = documents_of(model, valid_tokens(start.caught.mask, batch, tokens, device))
    if documents is None:
        return start
    caught = replace(start.caught, documents=documents)
    return Entrance(laid_out(start.arguments, documents), caught, documents)


def final_hidden(model: "PreTrainedModel", start: Entrance) -> Float[Tensor, "batch tokens hidden"]:
    """Final hidden states after the last norm, from the decoder on, with whatever is attached to the model."""
    hanging, documents = attachment(model), start.documents
    if hanging is not None:
        hanging.facts.caught = start.caught
    with nullcontext() if documents is None or hanging is not None else apart(model, documents):
        hidden: Tensor = decoder_of(model)(**start.arguments).last_hidden_state
    return hidden if documents is None else documents.padded(hidden)
