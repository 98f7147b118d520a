"""Gates out of a training checkpoint, as an artefact; needs neither the base nor the data."""

import json
from pathlib import Path
from typing import Any

import torch

from retention.gates import RetentionGates, gate_from_dict
from retention.memory import RetentionMemory, memory_from_dict
from retention.types import ModelShape


def chosen_record(validation: dict[str, Any]) -> dict[str, Any]:
    """What an artefact says of the step its gates come from, from the validation callback's state."""
    rows = {f"{row['scope']} {row['budget']}": round(row["accuracy"], 4) for row in validation["rows"]}
    curve = {} if validation.get("curve") is None else {"calibration": validation["curve"]}
    return {"chosen_step": validation["step"], "validation": rows, **curve}


def export_checkpoint(checkpoint: Path, folder: Path, *, which: str = "best") -> Path:
    """Write the artefact of a training checkpoint: the `best` gates under hard eviction so far, or the `last`.

    Raises:
        ValueError: when the file is no training checkpoint, or holds no validated gates yet.
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)  # noqa: TID251  (Lightning's resume file)
        card = json.loads(state["gate_card"])
    except (OSError, KeyError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"expected a checkpoint of train.py, {checkpoint} is none ({type(error).__name__})") from error
    validation = next(v for k, v in state["callbacks"].items() if k.startswith("HardEvictionValidation"))
    if which == "best" and not validation["best"]:
        raise ValueError(f"{checkpoint} was written before the first validation; export it with --which last")
    shape = ModelShape(**{**card["shape"], "layers": tuple(card["shape"]["layers"])})
    gates = RetentionGates(gate_from_dict(card["gate"]), shape, card["base"])
    if card.get("memory"):
        gates.memory = RetentionMemory(memory_from_dict(card["memory"]), shape)
    last = {k.removeprefix("gates."): v for k, v in state["state_dict"].items() if k.startswith("gates.")}
    gates.load_state_dict(validation["best"] if which == "best" else last)
    chosen = chosen_record(validation) if which == "best" else {"chosen_step": state["global_step"]}
    gates.training_record = card["training"] | chosen
    gates.save_pretrained(folder)
    return folder
