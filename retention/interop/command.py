"""The commands `import` and `export`: gates of others as an artefact, an artefact as something for others."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.checkpoint import shown
from retention.gates import RetentionGates
from retention.interop import dms, fastkvzip, kvzap, locret, trim_kv
from retention.interop.kept import kept_positions
from retention.interop.kvpress import export_press
from retention.interop.program import export_gate
from retention.models.load import load_frozen
from retention.policies import POLICIES, policy_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPORTERS: dict[str, Callable[[Path, "PreTrainedModel"], RetentionGates]] = {
    "dms": dms.load,
    "fastkvzip": fastkvzip.load,
    "kvzap": kvzap.load,
    "locret": locret.load,
    "trim_kv": trim_kv.load,
}
TARGETS = {
    "press": (),
    "programs": ("budget", "dtype"),
    "kept": ("prompt", "policy", "budget", "base", "revision", "dtype"),
}
"""What gates are exported to, and the settings that each reads."""


def import_gates(args: Namespace) -> str:
    """Read published gates, hold them against their base, save them as an artefact; says which policies take them.

    Raises:
        ValueError: for an unknown kind, files that are not there, or gates that do not fit the base.
    """
    if args.kind not in IMPORTERS:
        raise ValueError(f"expected --kind among {', '.join(IMPORTERS)}, got {args.kind!r}")
    source = Path(args.source)
    if not source.exists():  # before the base is loaded, which may take minutes
        raise ValueError(f"expected downloaded gates at {source}, found nothing; check the path")
    model, _ = _base(args, args.base)
    gates = IMPORTERS[args.kind](source, model)
    gates.base["revision"] = args.revision
    gates.save_pretrained(args.out, storage=args.storage)
    names = ", ".join(name for name, policy in POLICIES.items() if policy.gates_of == gates.objective)
    published = gates.training_record["imported"].get("as_published", "as policies are by default")
    return f"gates: {args.out}\npolicies that rank by them: {names}\nas published: {published}"


def export_gates(args: Namespace) -> str:
    """Write what was asked for, and say where.

    Raises:
        ValueError: for an unknown target, settings that it does not read, or gates that it cannot take.
    """
    if args.to not in TARGETS:
        raise ValueError(f"expected --to among {', '.join(TARGETS)}, got {args.to!r}")
    for name in TARGETS["kept"]:
        if getattr(args, name) is not None and name not in TARGETS[args.to]:
            raise ValueError(f"expected no --{name} for --to {args.to}, which does not read it; leave it out")
    gates, out = RetentionGates.from_pretrained(args.gates), Path(args.out)
    match args.to:
        case "press":
            return f"press: {export_press(gates, out)}"
        case "programs":
            files = export_gate(gates, out, budget=_entries(args.budget), dtype=_dtype(args.dtype))
            return f"programs: {len(files)} in {out}"
    if args.prompt is None:
        raise ValueError("expected a text file whose positions are kept or not (--prompt), got none")
    if args.base is None:  # gates may come from anybody, who would choose what is fetched and loaded
        raise ValueError(
            f"expected the base (--base), which these gates call {shown(gates.base.get('name_or_path'))}, got none"
        )
    text = Path(args.prompt).read_text()
    if not text.strip():
        raise ValueError(f"expected text in {args.prompt}, got none")
    name = args.policy or policy_of(gates.objective)
    if name not in POLICIES:
        raise ValueError(f"expected --policy among {', '.join(POLICIES)}, got {name!r}")
    budget = Budget.parse(args.budget or "10%")
    model, processor = _base(args, args.base)
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    kept = kept_positions(model, inputs, POLICIES[name](), CacheConfig(budget), gates=gates)
    entries = int(kept.counts.sum()), kept.counts.numel() * int(kept.seen[0])
    return f"kept positions: {kept.save(out)} ({entries[0]} of {entries[1]} entries)"


def _base(args: Namespace, name: str) -> tuple["PreTrainedModel", Any]:
    """The base on the CPU, where it is read once."""
    return load_frozen(name, dtype=_dtype(args.dtype), device="cpu", revision=args.revision)


def _dtype(name: str | None) -> torch.dtype:
    return torch.float32 if name is None else getattr(torch, name)


def _entries(text: str | None) -> float | None:
    """Entries per head; None where nothing was said.

    Raises:
        ValueError: for a share or bytes, which a program alone cannot turn into entries.
    """
    if text is None:
        return None
    budget = Budget.parse(text)
    if budget.unit != "tokens":
        raise ValueError(f"expected --budget of programs in entries per head, as in 1024, got {text!r}")
    return budget.amount
