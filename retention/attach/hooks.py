"""Hangs another attention and hooks onto an unforked model, and takes everything off again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from retention.attach.facts import Facts, TokenFacts
from retention.attach.plain import AttentionCall
from retention.models import family_of
from retention.models.family import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "retention"
"""Of our attention function, as transformers knows it."""


@dataclass(frozen=True)
class Attachment:
    """What hangs on a model."""

    facts: TokenFacts
    again: Callable[[], AbstractContextManager[Any]]
    """Hangs the same on the model once more, later, for layers that are run again in the backward."""


_attached: "WeakKeyDictionary[nn.Module, Attachment]" = WeakKeyDictionary()

Attend = Callable[[AttentionCall], Tensor]
"""A layer's attention, [batch, queries, heads, value_dim]."""
BeforeLayer = Callable[[int, dict[str, Any]], Attend | None]
"""Of an attention module: the layer's number in the decoder and its arguments; gives how the layer is to attend this
time, None for as the model does."""


@contextmanager
def attached(
    model: "PreTrainedModel",
    layers: tuple[int, ...],
    before_layer: BeforeLayer,
    *,
    before_forward: Callable[[Facts], None] | None = None,
) -> Iterator[TokenFacts]:
    """Let these layers of the decoder attend as `before_layer` says; on exit all is as before.

    `before_forward` sees the facts of each forward of the decoder; without it the caller takes them itself.

    Raises:
        ValueError: when the model is attached already.
    """
    if model in _attached:
        raise ValueError("this model is attached already: leave the other attach_gates or evicting block first")
    facts, decoder = TokenFacts(family_of(model), model.config), decoder_of(model)
    _register()

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert before_forward is not None
        before_forward(facts.of(kwargs))

    with ExitStack() as stack:
        stack.callback(_attached.pop, model)
        _attached[model] = Attachment(facts, lambda: attached(model, layers, before_layer))
        stack.callback(_set_attention, model, decoder.config._attn_implementation)
        _set_attention(model, NAME)
        stack.callback(model.register_forward_pre_hook(facts.catch, with_kwargs=True).remove)
        if before_forward is not None:
            stack.callback(decoder.register_forward_pre_hook(entering, with_kwargs=True).remove)
        stack.enter_context(layer_hooks(decoder, layers, before_layer))
        yield facts


@contextmanager
def layer_hooks(decoder: Any, layers: tuple[int, ...], before_layer: BeforeLayer) -> Iterator[None]:
    """Inside, these layers' attention modules hand on what `before_layer` gives."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "retention_attend": before_layer(module.layer_idx, kwargs)}

    with ExitStack() as stack:
        for layer in layers:
            hook = decoder.layers[layer].self_attn.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
        yield


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module runs another forward; on exit its class's, or the one it had of its own."""
    own: Any = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def attachment(model: nn.Module) -> Attachment | None:
    """What hangs on a model now, if anything."""
    return _attached.get(model)


def _set_attention(model: "PreTrainedModel", name: str) -> None:
    composite = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": name} if composite else name)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    retention_attend: Attend | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface: as the layer was told; layers that were told nothing, as without us."""
    call = AttentionCall(module, query, key, value, attention_mask, how)
    return (call.plain() if retention_attend is None else retention_attend(call)), None


def _register() -> None:
    """Make the attention function known to transformers, with the mask SDPA gets; idempotent, never at import."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
