"""The model card of a gate artefact, written from its config: what was trained on what, and accuracy by budget."""

import re
from typing import Any

from huggingface_hub import ModelCardData

from retention.checkpoint import CARD, PICTURE
from retention.gates.curve import SCOPES, Curve, measured, picture

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


def model_card(config: dict[str, Any]) -> dict[str, bytes]:
    """Markdown with the hub's front matter and, where accuracy was measured, its picture, by file name.

    Both say only what the config holds.
    """
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
    curve = measured(training.get("validation"))
    drawn = picture(curve)
    text = _CARD.format(
        header=_header(base.get("name_or_path"), config["gate"]["name"]),
        gate=config["gate"]["name"],
        base=_cell(name),
        rows="\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items()),
        curve="Not measured." if curve is None else _table(curve, drawn is not None),
    )
    return {CARD: text.encode(errors="replace")} | ({} if drawn is None else {PICTURE: drawn})


def _header(base: Any, gate: str) -> str:
    """Front matter; the base only where its name may be a hub id, which a folder's or the embedded model's is not."""
    known = isinstance(base, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII)
    tags = ["kv-cache", "retention-gates", gate]
    return ModelCardData(library_name="retention", tags=tags, base_model=base if known else None).to_yaml()


def _cell(value: Any) -> str:
    """Text that stays inside one cell and points nowhere, whatever it says."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "/").replace("<", "&lt;").replace("](", "] (")


def _table(curve: Curve, pictured: bool) -> str:
    """Accuracy under hard eviction on validation contexts, largest budget first, below its picture."""
    lines = [f"| kept | {' | '.join(SCOPES.values())} |", "|---|---|---|"]
    lines += [] if curve.full is None else [f"| all | {curve.full:.3f} | {curve.full:.3f} |"]
    for budget, values in curve.budgets.items():
        told = ("" if x is None else f"{x:.3f}" for x in (values.get(scope) for scope in SCOPES))
        lines.append(f"| {_cell(budget)} | {' | '.join(told)} |")
    said = "Validation contexts, entries physically evicted before any question is read."
    return "\n".join([*([f"![Accuracy by budget]({PICTURE})", ""] if pictured else []), said, "", *lines])
