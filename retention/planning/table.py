"""A plan in words and figures, for the command line."""

from collections.abc import Iterable

from retention.cache.ledger import ITEMS
from retention.planning import Plan

GIB = 2**30


def table(plans: Iterable[Plan]) -> str:
    """Plans of one model and prompt side by side: without a memory, and with one where there is one."""
    first, *others = plans
    columns = [
        ("full", first.full),
        ("evicted", first.evicted),
        *((f"with memory {x.memory}", x.evicted) for x in others),
    ]
    shape, sizes = first.sizes.shape, first.sizes
    kinds = ", ".join(f"{sizes.count(kind)} {kind}" for kind in dict.fromkeys(sizes.kinds))
    entries = ", ".join(str(x.entries) for x in (first, *others))
    lines = [
        f"{shape.model_type}: layers {kinds}; {shape.num_kv_heads} KV heads of {shape.head_dim}, {sizes.element} bytes a number",
        f"{first.batch} x {first.context} tokens, budget {first.budget}, policy {first.policy}: {entries} entries per layer and head",
        "",
    ]
    lines.append(f"{'':<34}" + "".join(f"{name:>34}" for name, _ in columns))
    for kind in columns[0][1].by_kind:
        lines.append(_row(f"{kind} layers", (held.by_kind[kind] for _, held in columns)))
    for item in ITEMS:
        if item != "outside" and any(held.items[item] for _, held in columns):
            lines.append(_row(f"  {item}", (held.items[item] for _, held in columns)))
    lines.append(_row("cache after the prompt", (held.total for _, held in columns)))
    lines.append(_row("cache at its peak, reading it", (held.peak for _, held in columns)))
    parts = (f"{held.total / first.full.total:.1%}, peak {held.peak / first.full.peak:.1%}" for _, held in columns)
    lines.append(f"{'part of the full cache':<34}" + "".join(f"{part:>34}" for part in parts))
    if any(held.peak > held.total for _, held in columns[1:]):
        lines.append("(the peak is that of prompts read whole, all at once, or in the chunks that were named)")
    lines.append("")
    lines.append(f"every decoded token adds {_bytes(first.per_token)}; decoding reserves at most {_bytes(first.slack)}")
    weights = "not told by this config, name them (--weights)" if sizes.weights is None else _bytes(sizes.weights)
    lines.append(f"weights: {weights}")
    if first.device_memory is not None:
        said = [f"{first.largest['full']} full", *(f"{x.largest['evicted']} {name}" for x, (name, _) in zip((first, *others), columns[1:], strict=True))]  # fmt: skip
        lines.append(f"largest batch in {_bytes(first.device_memory)}, activations not counted: {', '.join(said)}")
    return "\n".join(lines)


def _row(name: str, figures: Iterable[int]) -> str:
    return f"{name:<34}" + "".join(f"{_bytes(x):>34}" for x in figures)


def _bytes(number: int) -> str:
    return f"{number:,} B ({number / GIB:.3f} GiB)"
