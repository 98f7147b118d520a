"""Attention of one new token over an evicting layer: dense where heads are equal, ragged over pages where not."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from retention.cache.layer import EvictingLayer
from retention.cache.recall import attention_with_lse, doubt_of
from retention.ops import ragged_triton
from retention.ops.kernels import has_triton
from retention.ops.logits import softcap_of
from retention.ops.ragged import ragged_attention


def decode_attention(
    layer: EvictingLayer, query: Float[Tensor, "batch heads 1 head_dim"], scaling: float
) -> Float[Tensor, "batch heads 1 value_dim"]:
    """Attention over everything the layer holds, read where it lies.

    The query group of a KV head goes through one product, so keys and values are read once, not once per head.
    """
    if layer.recalled:
        return recalled_attention(layer, query, scaling)
    store = layer.store
    keys, values = (buffer.view() for buffer in store.buffers)
    visible = layer.buffer_visible()
    if store.owner is not None:
        return _ragged(layer, query, keys, values, visible, scaling)
    if softcap_of(scaling) is not None:
        return attention_with_lse(query, *layer.read(), layer.visible(1), scaling)[0]
    grouped = query.view(query.shape[0], keys.shape[1], -1, query.shape[-1])
    mask = None if visible is None else visible[:, :, None]
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(*query.shape[:3], -1)


def recalled_attention(
    layer: EvictingLayer, query: Float[Tensor, "batch heads queries head_dim"], scaling: float
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention over what the layer holds, corrected by its memory of what left."""
    memory = layer.memory
    assert memory is not None
    keys, values = layer.read()
    visible = layer.visible(query.shape[2])
    out, lse = attention_with_lse(query, keys, values, visible, scaling)
    visual = layer.state().visual if memory.reads_doubt else visible[:, :, 0]
    doubt = doubt_of(memory, query, keys, visible, visual, scaling)
    return memory.read(layer.recalled, query, out, lse, scaling, doubt)[0]


def _ragged(
    layer: EvictingLayer, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scaling: float
) -> Tensor:
    """Over pages and buffer together: by the fused kernel on a GPU, by batched products elsewhere."""
    store, (pages_k, pages_v) = layer.store, layer.store.pages
    assert store.owner is not None
    assert store.page_counts is not None
    if softcap_of(scaling) is not None or not (query.is_cuda and has_triton()):
        return ragged_attention(query, pages_k, pages_v, store.owner, keys, values, visible, scaling)[0]
    return ragged_triton.decode(
        query,
        pages_k,
        pages_v,
        F.pad(store.page_counts.flatten().cumsum(0), (1, 0)),
        store.buffers[0].data,
        store.buffers[1].data,
        store.buffers[0].used,
        store.front - store.loose_counts(),
        layer.buffer_valid(),
        scaling,
        longest_pages=store.longest_pages,
    )
