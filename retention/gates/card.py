"""The model card of a gate artefact, written from its config."""

from typing import Any

_CARD = """---
library_name: retention
tags: [kv-cache, retention-gates]
---
# Retention gates ({gate}) for {base}

Learned gates that decide which KV-cache entries of the frozen base stay. They hold no weight of the base.

| | |
|---|---|
| base | {base} ({model_type}, {layers} evictable layers, {kv_heads} KV heads) |
| config hash, weight hash | {config_hash}, {weight_hash} |
| training | {training} |
| validation under hard eviction | {validation} |

Use: `retention.RetentionGates.from_pretrained(<this folder>)`, then `retention.evicting(model, policy, config, gates=gates)`.

Limits: the gates rank tokens without seeing later questions; they know the data they were trained on. Exact
retrieval of arbitrary facts at very small budgets is beyond any question-agnostic gate.
"""


def model_card(config: dict[str, Any]) -> str:
    """Markdown with front matter; says only what the config holds."""
    training = config["training"]
    keys = ("objective", "task", "steps", "budget", "loss_weights", "scope", "seed")
    told = "; ".join(f"{key} {training[key]}" for key in keys if key in training) or "untrained"
    return _CARD.format(
        gate=config["gate"]["name"],
        base=config["base"].get("name_or_path", "an unnamed base"),
        model_type=config["shape"]["model_type"],
        layers=len(config["shape"]["layers"]),
        kv_heads=config["shape"]["num_kv_heads"],
        config_hash=config["base"].get("config_hash", "unknown"),
        weight_hash=config["base"].get("weight_hash", "unknown"),
        training=told,
        validation=training.get("validation", "not measured"),
    )
