"""Attention of one new token over an evicting layer: dense where heads are equal, ragged over pages where not."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from retention.cache.layer import EvictingLayer
from retention.ops.ragged import ragged_attention


def decode_attention(
    layer: EvictingLayer, query: Float[Tensor, "batch heads 1 head_dim"], scaling: float
) -> Float[Tensor, "batch heads 1 value_dim"]:
    """Attention over everything the layer holds, read where it lies.

    The query group of a KV head goes through one product, so keys and values are read once, not once per head.
    """
    store = layer.store
    keys, values = (buffer.view() for buffer in store.buffers)
    visible = layer.buffer_visible()
    if store.owner is not None:
        pages, shown = store.pages, visible
        return ragged_attention(query, pages[0], pages[1], store.owner, keys, values, shown, scaling)[0]
    grouped = query.view(query.shape[0], keys.shape[1], -1, query.shape[-1])
    mask = None if visible is None else visible[:, :, None]
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(*query.shape[:3], -1)
