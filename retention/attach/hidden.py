"""Final hidden states of a forward, for losses that go through the frozen head in chunks."""

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from retention.models.family import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def final_hidden(model: "PreTrainedModel", inputs: dict[str, Tensor]) -> Float[Tensor, "batch tokens hidden"]:
    """Run the whole model without a cache and return what its head would read, after the final norm."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output.last_hidden_state)

    hook = decoder_of(model).register_forward_hook(catch)
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return caught[-1]
