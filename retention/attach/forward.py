"""One forward into an evicting cache: of a prompt, or of the newest token of every row; and what ends an answer."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from retention.attach.positions import position_ids
from retention.cache.evicting import EvictingCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def end_tokens(model: "PreTrainedModel") -> list[int]:
    """Tokens that end what a model writes."""
    told = model.generation_config.eos_token_id
    return torch.tensor([] if told is None else told, dtype=torch.long).flatten().tolist()


@torch.no_grad()
def next_logits(
    model: "PreTrainedModel", cache: EvictingCache, inputs: dict[str, Tensor]
) -> Float[Tensor, "batch vocabulary"]:
    """Logits of the last token of each row, which the cache then holds; as `tail_logits`."""
    return tail_logits(model, cache, inputs, 1)[:, -1]


@torch.no_grad()
def tail_logits(
    model: "PreTrainedModel", cache: EvictingCache, inputs: dict[str, Tensor], count: int
) -> Float[Tensor, "batch count vocabulary"]:
    """Logits of the last `count` tokens, all of which the cache then holds; positions count tokens seen, no padding.

    `inputs` are a processor's, left-padded, for what is new: to be called inside the block that the cache comes from.
    """
    own = {k: v.to(model.device) for k, v in inputs.items()}
    ids, mask = own.pop("input_ids"), own.pop("attention_mask")
    past = cache.tokens.valid.to(mask.dtype) if cache.columns else mask[:, :0]
    out = model(
        input_ids=ids,
        attention_mask=torch.cat([past, mask], 1),
        position_ids=position_ids(model, cache, ids, mask, own),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=count,
        **own,
    )
    return out.logits
