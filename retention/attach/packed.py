"""Runs a decoder on a batch's rows as documents of one row: what it computes per token is spent on no padding.

Documents never see each other: attention runs in each by itself, and positions begin at 0 in each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retention.attach.hooks import attached
from retention.attach.plain import AttentionCall
from retention.models import family_of
from retention.models.family import decoder_of, evictable_layers
from retention.ops.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def documents_of(model: "PreTrainedModel", valid: Bool[Tensor, "batch tokens"]) -> Documents | None:
    """A padded batch's rows as documents; None where nothing is padded, so that there is nothing to gain.

    Raises:
        ValueError: for a decoder whose layers see more or less than their document's past.
    """
    layers = len(decoder_of(model).layers)
    if family_of(model).own_mask or len(evictable_layers(model)) < layers:
        raise ValueError(
            f"expected a decoder of full causal attention for data.packing, got {model.config.model_type} with "
            f"{len(evictable_layers(model))} such layers of {layers}; set data.packing=false"
        )
    return None if bool(valid.all()) else Documents.of(valid)


def laid_out(arguments: dict[str, Any], documents: Documents) -> dict[str, Any]:
    """A decoder's arguments for a padded batch as those for one row of documents."""
    shape, found = documents.valid.shape, {}
    for name, value in arguments.items():
        axes = [i for i in (0, 1) if isinstance(value, Tensor) and value.shape[i : i + 2] == shape]
        found[name] = documents.packed(value, axes[0]) if axes else value
    if found.get("position_ids") is None or found["position_ids"].shape[-1] != len(documents.places):
        found["position_ids"] = documents.positions()
    found.pop("cache_position", None)
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=documents.valid.device)
    return {**found, "attention_mask": nothing}  # of four dimensions, so that no decoder makes one of its own


@contextmanager
def apart(model: "PreTrainedModel", documents: Documents) -> Iterator[None]:
    """Inside, every layer's attention runs in each document by itself."""
    layers = tuple(range(len(decoder_of(model).layers)))
    with attached(model, layers, lambda layer, kwargs: partial(in_each, documents)):
        yield


def in_each(documents: Documents, call: AttentionCall) -> Float[Tensor, "batch queries heads value_dim"]:
    """The model's own attention, causal in each document."""
    parts = zip(*(x.split(documents.lengths, 2) for x in (call.query, call.key, call.value)), strict=True)
    return torch.cat([replace(call, query=q, key=k, value=v, mask=None).plain() for q, k, v in parts], 1)
