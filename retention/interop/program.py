"""Gates as `torch.export` programs, for runtimes without this package: hidden states in, `log_beta` out."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retention.files import write_json
from retention.gates import RetentionGates
from retention.ops.decay import log_beta_from_score

CARD = "programs.json"


class LayerGate(nn.Module):
    """The gate of one layer at one budget, with its own copy of what layers share."""

    def __init__(self, gates: RetentionGates, number: int, budget: float | None = None) -> None:
        super().__init__()
        self.trunk, self.head = gates.stack.layers[number], gates.stack.shared
        self.dtype = next(self.trunk.parameters()).dtype
        self.conditioned = gates.config.budget_conditioned
        found = None if budget is None else gates.config.coordinate(torch.tensor([budget]))
        self.coordinate = 0.0 if found is None else float(found)

    def forward(self, hidden_states: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch kv_heads tokens"]:
        """`log_beta` of every token, fp32; `hidden_states` is what the layer's attention reads."""
        score = self.trunk(hidden_states.to(self.dtype))
        score = score if self.head is None else self.head(score)
        if self.conditioned:
            score, slope = score.unbind(-1)
            score = score + self.coordinate * slope
        return log_beta_from_score(score.transpose(1, 2))


def export_gate(
    gates: RetentionGates, folder: Path | str, *, budget: float | None = None, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """Write `layer_<i>.pt2` for every decoder layer i with a gate, batch and tokens of any size, and `programs.json`.

    Hidden states are of `dtype`. Gates that read the budget are exported for one, in entries per head (by default
    their reference). Read a file with `torch.export.load(file).module()`.

    Raises:
        ValueError: for gates that read more than hidden states, or a budget for gates that read none.
    """
    if gates.stack.grounding is not None:
        raise ValueError("expected gates that read hidden states alone, these read modality or text too (gate.modality, gate.text_prior)")  # fmt: skip
    if budget is not None and not gates.config.budget_conditioned:
        raise ValueError(f"expected no budget for gates that read none, got {budget:g}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(gates.parameters()).device
    sizes = {"hidden_states": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    example = torch.zeros(2, 3, gates.shape.hidden_size, device=device, dtype=dtype)
    files = []
    for number, layer in enumerate(gates.shape.layers):
        with torch.no_grad():
            program = torch.export.export(LayerGate(gates, number, budget), (example,), dynamic_shapes=sizes)
        files.append(folder / f"layer_{layer}.pt2")
        torch.export.save(program, files[-1])
    about = {
        "base": gates.base,
        "shape": gates.shape.to_dict(),
        "objective": gates.objective,
        "decays": gates.decays,
        "delayed": gates.config.delayed,
        "budget": budget,
        "torch": torch.__version__,
        "input": f"hidden_states [batch, tokens, {gates.shape.hidden_size}], {str(dtype).removeprefix('torch.')}",
        "output": f"log_beta [batch, {gates.shape.num_kv_heads}, tokens], float32",
        "files": [file.name for file in files],
    }
    write_json(folder / CARD, about)
    return files
