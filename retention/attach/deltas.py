"""Models with three-axis positions keep the offset of the last prompt on themselves; here it belongs to the cache."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from retention.cache.evicting import EvictingCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def own_rope_deltas(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, each evicting cache brings its own `rope_deltas`, so that conversations may take turns on one model."""
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "rope_deltas"):
        yield
        return

    def bring(kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, EvictingCache):
            inner.rope_deltas = cache.rope_deltas

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bring(kwargs)

    def take(kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, EvictingCache):
            cache.rope_deltas = inner.rope_deltas

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        take(kwargs)

    prepare: Any = model._prepare_position_ids_for_generation

    def prepare_own(inputs: Any, kwargs: dict[str, Any]) -> Any:
        bring(kwargs)
        positions = prepare(inputs, kwargs)
        take(kwargs)
        return positions

    held = inner.rope_deltas
    with ExitStack() as stack:
        stack.callback(setattr, inner, "rope_deltas", held)
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        vars(model)["_prepare_position_ids_for_generation"] = prepare_own
        stack.callback(vars(model).pop, "_prepare_position_ids_for_generation")
        yield
