"""The command `plan`: from its arguments to its text."""

from argparse import Namespace
from typing import Any

import torch

from retention.budget import Budget
from retention.memory import memory_from_dict
from retention.planning import plan
from retention.planning.table import table


def run(args: Namespace) -> str:
    """The plan that was asked for, beside the same with a memory where one was named.

    Raises:
        ValueError: for arguments that do not fit, or a config that cannot be planned.
    """
    given: dict[str, Any] = {
        "policy": args.policy,
        "prefill_chunk": args.prefill_chunk,
        "dtype": None if args.dtype is None else getattr(torch, args.dtype),
        "device_memory": _size(args, "gpu"),
        "weights": _size(args, "weights"),
        "reserve": args.reserve,
    }
    asked = args.config, args.context, args.batch, args.budget
    plans = [plan(*asked, **given)]
    if args.memory != "none":
        plans.append(plan(*asked, **given, memory=memory_from_dict({"name": args.memory}), on_evict=args.on_evict))
    return table(plans)


def _size(args: Namespace, name: str) -> int | None:
    """Bytes of `80GiB`; None where nothing was said.

    Raises:
        ValueError: when it is no size.
    """
    text = getattr(args, name)
    if text is None:
        return None
    size = Budget.parse(text)
    if size.unit != "bytes":
        raise ValueError(f"expected --{name} in bytes, as in 80GiB, got {text!r}")
    return int(size.amount)
