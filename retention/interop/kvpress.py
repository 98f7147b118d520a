"""Gates as a press of kvpress, which needs another transformers and therefore a process of its own."""

from importlib.resources import files
from pathlib import Path

from retention.files import write_json, write_text
from retention.gates import RetentionGates
from retention.policies import POLICIES, policy_of

PRESS, METHOD = "retention_press.py", "press.json"
MANY = 2**40
"""A budget that caps no method's window."""


def export_press(gates: RetentionGates, folder: Path | str) -> Path:
    """Write the artefact and, beside it, `retention_press.py` with a `ScorerPress` that reads it and nothing of ours.

    Each head keeps its best entries by `log_alpha` at the next query, or by the score of gates that do not decay, as
    our policies do under `cache.allocator=uniform`. Tested against kvpress 0.5.5 (scripts/check_press.py).

    Raises:
        ValueError: for gates that read more than hidden states, which a press is not told, or do not read tokens.
    """
    if gates.stack.grounding is not None:
        raise ValueError("expected gates that read hidden states alone, these read modality or text too (gate.modality, gate.text_prior)")  # fmt: skip
    if not gates.config.reads_tokens:
        raise ValueError(f"expected gates that tell tokens apart, got {gates.config.name}: a press ranks within a head")
    folder, recent = Path(folder), POLICIES[policy_of(gates.objective)]().recent(MANY)
    gates.save_pretrained(folder)
    write_json(folder / METHOD, {"objective": gates.objective, "decays": gates.decays, "recent_size": recent})
    write_text(folder / PRESS, (files("retention.interop") / "press.txt").read_text())
    return folder
