"""The model card of a gate artefact, written from its config: what was trained on what, and accuracy by budget."""

import re
from typing import Any

from huggingface_hub import ModelCardData

from retention.budget import Budget

SCOPES = {"global": "one pool", "per_head": "head by head"}
"""How validation evicts, by the words of its record."""
_CARD = """---
{header}
---
# Retention gates ({gate}) for {base}

Learned gates that decide which KV-cache entries of the frozen base stay. They hold no weight of the base.

| | |
|---|---|
{rows}

## Accuracy by budget

{curve}

## Use

`retention.RetentionGates.from_pretrained(<this folder>)`, then `retention.evicting(model, policy, config, gates=gates)`.

Limits: the gates rank tokens without seeing later questions; they know the data they were trained on. Exact
retrieval of arbitrary facts at very small budgets is beyond any question-agnostic gate.
"""


def model_card(config: dict[str, Any]) -> str:
    """Markdown with the hub's front matter; says only what the config holds."""
    training, base, shape = config["training"], config["base"], config["shape"]
    name = base.get("name_or_path") or "an unnamed base"
    keys = ("objective", "task", "steps", "budget", "loss_weights", "scope", "seed")
    told = "; ".join(f"{key} {training[key]}" for key in keys if key in training) or "untrained"
    data = {key: training[key] for key in ("task_settings", "data_seed", "data") if key in training}
    sizes = f"{shape['model_type']}, {len(shape['layers'])} evictable layers, {shape['num_kv_heads']} KV heads"
    rows = {
        "base": f"{name} ({sizes})",
        "revision, commit": f"{base.get('revision') or 'not given'}, {base.get('commit') or 'not known'}",
        "config hash, weight hash": f"{base.get('config_hash', 'unknown')}, {base.get('weight_hash', 'unknown')}",
        "training": told,
        "data": "; ".join(f"{key} {value}" for key, value in data.items()) or "not told",
        "memory of evicted tokens": "none" if config["memory"] is None else config["memory"]["name"],
        "storage": config["storage"],
        **{f"convention: {key}": value for key, value in config["conventions"].items()},
        "versions": ", ".join(f"{key} {value}" for key, value in config["versions"].items()),
    }
    return _CARD.format(
        header=_header(base.get("name_or_path"), config["gate"]["name"]),
        gate=config["gate"]["name"],
        base=_cell(name),
        rows="\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items()),
        curve=_curve(training.get("validation")),
    )


def _header(base: Any, gate: str) -> str:
    """Front matter; the base only where its name may be a hub id, which a folder's or the embedded model's is not."""
    known = isinstance(base, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII)
    tags = ["kv-cache", "retention-gates", gate]
    return ModelCardData(library_name="retention", tags=tags, base_model=base if known else None).to_yaml()


def _cell(value: Any) -> str:
    """Text that stays inside one cell, whatever it says."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "/").replace("<", "&lt;")


def _curve(validation: Any) -> str:
    """Accuracy under hard eviction on validation contexts as a table, largest budget first."""
    found: dict[str, dict[str, float]] = {}
    for key, value in validation.items() if isinstance(validation, dict) else ():
        scope, _, budget = str(key).partition(" ")
        if scope in SCOPES and isinstance(value, int | float):
            found.setdefault(budget, {})[scope] = value
    if not found:
        return "Not measured."
    full = found.pop("full", {}).get("global")
    lines = [f"| kept | {' | '.join(SCOPES.values())} |", "|---|---|---|"]
    lines += [] if full is None else [f"| all | {full:.3f} | {full:.3f} |"]
    for budget in sorted(found, key=_size, reverse=True):
        values = (found[budget].get(scope) for scope in SCOPES)
        lines.append(f"| {_cell(budget)} | {' | '.join('' if x is None else f'{x:.3f}' for x in values)} |")
    return "\n".join(["Validation contexts, entries physically evicted before any question is read.", "", *lines])


def _size(budget: str) -> tuple[str, float]:
    """Where a budget stands in the table; what is none stands last."""
    try:
        parsed = Budget.parse(budget)
    except ValueError:
        return ("", 0.0)
    return (parsed.unit, parsed.amount)
