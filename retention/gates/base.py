"""Retention gates: from the attention input of each layer to `log_beta`, one number per token and KV head."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from retention import checkpoint
from retention.gates.architecture import GateConfig
from retention.gates.beside import Reading
from retention.gates.calibration import Calibration
from retention.memory import RetentionMemory, memory_from_dict
from retention.models.family import decoder_device, fingerprint, model_shape
from retention.ops.decay import log_beta_from_score
from retention.types import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RetentionGates(nn.Module, ModelHubMixin, library_name="retention", tags=["kv-cache"]):
    """The trainable part of the framework: gates for all layers of one frozen base, and their artefact."""

    def __init__(self, config: GateConfig, shape: ModelShape, base: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._hub_mixin_config = None
        self.config = config
        self.shape = shape
        self.base = base or {}
        self.training_record: dict[str, Any] = {}
        self.stack = config.build(shape)
        self.stack.grounding = config.grounding(shape)
        self.memory: RetentionMemory | None = None
        """The memory of evicted tokens that was trained with these gates, if any."""

    @classmethod
    def for_model(cls, config: GateConfig, model: "PreTrainedModel") -> "RetentionGates":
        """Fresh gates that fit a frozen model, on its device."""
        device = decoder_device(model)
        base = {"name_or_path": model.config.name_or_path, **fingerprint(model)}
        return cls(config, model_shape(model), base).to(device)

    def forward(
        self, layer: int, hidden_states: Float[Tensor, "batch tokens hidden"], **beside: Tensor | None
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        """`log_beta` of every token for evictable layer number `layer`, fp32, at most 0: the log-sigmoid of `score`."""
        return log_beta_from_score(self.score(layer, hidden_states, **beside))

    def score(
        self,
        layer: int,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        *,
        visual: Bool[Tensor, "batch tokens"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        budget: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        """The gate's pre-activation, fp32: what regressions fit and policies without decay rank by.

        `budget` in entries per head is for conditioned gates, by default their reference.
        """
        return self.read(layer, hidden_states, visual, valid).at(self.config.coordinate(budget))

    def read(
        self,
        layer: int,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        visual: Bool[Tensor, "batch tokens"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        heard: Float[Tensor, "batch hidden"] | None = None,
    ) -> Reading:
        """What the gate says of new tokens, at any budget.

        `visual` and `valid` are read by grounded gates, by default text without padding; `heard` is the reading's of
        the tokens before.
        """
        hidden = hidden_states.to(next(self.stack.layers[layer].parameters()).dtype)
        if self.stack.grounding is not None:
            visual = torch.zeros_like(hidden[..., 0], dtype=torch.bool) if visual is None else visual
            valid = torch.ones_like(visual) if valid is None else valid
            hidden, heard = self.stack.grounding[layer](hidden, visual, valid, heard)
        score = self.stack.score(layer, hidden)
        if not self.config.budget_conditioned:
            return Reading(score.transpose(1, 2), heard=heard)
        score, slope = score.transpose(1, 2).unbind(-1)
        return Reading(score, slope, heard)

    @torch.no_grad()
    def start_at(self, score: float) -> None:
        """Set every offset, so that scores start around this value."""
        for name, parameter in self.named_parameters():
            if name.endswith("offset"):
                parameter.fill_(score)

    @property
    def objective(self) -> str:
        """Name of the objective these gates were trained by; untrained ones count as distilled."""
        return self.training_record.get("objective", "distillation")

    @property
    def decays(self) -> bool:
        """Whether the output is a retention per step; otherwise its score ranks tokens whatever their age."""
        return self.training_record.get("score_kind", "decay") == "decay"

    def thresholds(self, ranks: str | None, plain: bool, budgets: Shaped[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Scores that keep these budgets on average, by the artefact's calibration curve.

        `ranks` is the objective whose gates a policy ranks by, `plain` whether by their score at default settings.

        Raises:
            ValueError: when there is no curve, or it was measured for another score.
        """
        if ranks != self.objective or not plain:
            raise ValueError(
                f"the calibration curve of gates trained with {self.objective} is of their own policy at its default "
                "settings; use that, or give cache.threshold"
            )
        return Calibration.from_record(self.training_record).at(budgets)

    def check_objective(self, wanted: str, policy: str) -> None:
        """Refuse a policy that ranks by gates of another objective.

        Raises:
            ValueError: naming the policy and both objectives.
        """
        if wanted != self.objective:
            raise ValueError(
                f"policy {policy} ranks by gates trained with objective {wanted}, these were trained with "
                f"{self.objective}; train some with objective={wanted}, or choose a policy that ranks by these"
            )

    def check(self, model: "PreTrainedModel") -> None:
        """Refuse a model these gates were not trained for.

        Raises:
            ValueError: naming both values of the first thing that differs.
        """
        expected, got = self.shape, model_shape(model)
        for field, word in (
            ("model_type", "family"),
            ("num_layers", "evictable layers"),
            ("num_kv_heads", "KV heads per layer"),
            ("hidden_size", "hidden features"),
            ("layers", "evictable layer indices"),
        ):
            ours, theirs = getattr(expected, field), getattr(got, field)
            if ours != theirs:
                raise ValueError(
                    f"gates were trained for {word} {ours}, the model has {theirs}; load the matching base or gates"
                )
        current = fingerprint(model)
        for key in ("config_hash", "weight_hash"):
            if self.base.get(key) not in (None, current[key]):
                raise ValueError(
                    f"gates were trained on base {self.base.get('name_or_path')!r} ({key} {self.base[key]}), the model is "
                    f"{model.config.name_or_path!r} ({key} {current[key]}); load the base they were trained on"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Tensors under their artefact names: `layers.<i>.<param>` and, stored once, `shared.<param>`."""
        memory = {} if self.memory is None else self.memory.state_dict(prefix="memory.")
        return dict(self.stack.state_dict()) | memory

    def card_config(self) -> dict[str, Any]:
        """Everything `gate_config.json` holds."""
        from retention.provenance import package_versions

        return {
            "format_version": checkpoint.FORMAT_VERSION,
            "base": self.base,
            "shape": self.shape.to_dict(),
            "gate": self.config.to_dict(),
            "memory": None if self.memory is None else self.memory.config.to_dict(),
            "training": self.training_record,
            "conventions": {"log_beta": "fp32, at most 0", "eviction_age": "seen - position", "age_offset": 0},
            "versions": package_versions(),
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        from retention.gates.card import model_card

        config = self.card_config()
        checkpoint.write(Path(save_directory), config, self.tensors(), model_card(config))

    def save_pretrained(self, save_directory: str | Path, **hub: Any) -> str | None:
        """Write the artefact atomically; with `push_to_hub=True` also upload it."""
        folder = Path(save_directory)
        if hub.pop("push_to_hub", False):
            hub.setdefault("repo_id", folder.name)
            self._save_pretrained(folder)
            return self.push_to_hub(**hub)
        self._save_pretrained(folder)
        return None

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> "RetentionGates":  # type: ignore[override]  # ours
        """Read an artefact from a folder or a hub id.

        Raises:
            ValueError: when it is missing, damaged, of a newer format, or its tensors do not fit its config.
        """
        from retention.gates import gate_from_dict

        local = os.path.isdir(name) or "/" not in str(name) or str(name).startswith((".", "/"))
        folder = (
            Path(name) if local else Path(snapshot_download(str(name), allow_patterns=["gate_*", "README.md"], **hub))
        )
        config, tensors = checkpoint.read(folder)
        shape = ModelShape(**{**config["shape"], "layers": tuple(config["shape"]["layers"])})
        gates = cls(gate_from_dict(config["gate"]), shape, config["base"])
        own = {name: x for name, x in tensors.items() if not name.startswith("memory.")}
        if config.get("memory"):
            gates.memory = RetentionMemory(memory_from_dict(config["memory"]), shape)
        recalled = {name.removeprefix("memory."): x for name, x in tensors.items() if name not in own}
        try:
            gates.stack.load_state_dict(own)
            if gates.memory is not None:
                gates.memory.load_state_dict(recalled)
        except RuntimeError as error:
            raise ValueError(
                f"the tensors in {folder} do not fit its config: {str(error).splitlines()[-1].strip()}"
            ) from error
        gates.training_record = config["training"]
        return gates.eval()
