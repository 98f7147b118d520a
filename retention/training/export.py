"""Gates and adapter out of a training checkpoint, as artefacts; needs neither the base nor the data."""

import json
from pathlib import Path
from typing import Any

import torch

from retention.gates import RetentionGates, gate_from_dict
from retention.memory import RetentionMemory, memory_from_dict
from retention.training.student import write_adapter
from retention.types import ModelShape


def chosen_record(validation: dict[str, Any]) -> dict[str, Any]:
    """What an artefact says of the step its gates come from, from the validation callback's state."""
    rows = {f"{row['scope']} {row['budget']}": round(row["accuracy"], 4) for row in validation["rows"]}
    curve = {} if validation.get("curve") is None else {"calibration": validation["curve"]}
    return {"chosen_step": validation["step"], "validation": rows, **curve}


def export_checkpoint(checkpoint: Path, folder: Path, *, which: str = "best") -> Path:
    """Write the artefact of a training checkpoint: the `best` gates under hard eviction so far, or the `last`.

    The student's adapter of the same step, where one is trained beside them, goes to the folder `adapter` in it.

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
    chosen_state = validation["best"], validation["student"]
    if which == "last":
        chosen_state = _part(state["state_dict"], "gates."), _part(state["state_dict"], "student.")
    gates.load_state_dict(chosen_state[0])
    chosen = chosen_record(validation) if which == "best" else {"chosen_step": state["global_step"]}
    gates.training_record = card["training"] | chosen
    gates.save_pretrained(folder)
    if state.get("adapter_card"):
        write_adapter(folder / "adapter", chosen_state[1], json.loads(state["adapter_card"]))
    return folder


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """One module's tensors by its own names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
