"""How near a token is to the text before it: a causal signal of what visual tokens are for."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def naive_text_relevance(
    hidden: Float[Tensor, "tokens hidden"], text: Bool[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Cosine of each token with the mean of the text tokens before it, one by one; 0 where there is none yet."""
    found = []
    for t in range(len(hidden)):
        before = hidden[:t][text[:t]].float()
        found.append(
            F.cosine_similarity(hidden[t].float(), before.mean(0), dim=0) if len(before) else hidden.new_zeros(())
        )
    return torch.stack(found).float()


def text_relevance(
    hidden: Float[Tensor, "batch tokens hidden"],
    text: Bool[Tensor, "batch tokens"],
    heard: Float[Tensor, "batch hidden"] | None = None,
) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch hidden"]]:
    """The same for a batch, and the sum of all text tokens so far, to go on from with the next tokens.

    A reconstruction: the papers that rank visual tokens by text do so by attention, with the question at hand; a
    gate must decide before. The cosine does not know a sum from a mean, so the sum is all that is carried, and a
    prompt in chunks gives what it gives at once.
    """
    hidden = hidden.float()
    start = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2]) if heard is None else heard[:, None]
    sums = torch.cat([start, hidden * text[..., None]], 1).cumsum(1)
    return F.cosine_similarity(hidden, sums[:, :-1], dim=-1), sums[:, -1].clone()
