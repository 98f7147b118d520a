"""Retention gates: from the attention input of each layer to `log_beta`, one number per token and KV head."""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelHubMixin
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from retention import checkpoint
from retention.gates.architecture import GateConfig
from retention.gates.beside import Reading
from retention.gates.calibration import Calibration
from retention.gates.loading import folder_of, gates_of
from retention.memory import RetentionMemory
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
    def for_model(cls, config: GateConfig, model: "PreTrainedModel", revision: str | None = None) -> "RetentionGates":
        """Fresh gates that fit a frozen model, on its device.

        `revision` is the branch, tag or commit it was asked for by; the commit it came from is noted where the hub told.
        """
        device = decoder_device(model)
        commit = getattr(model.config, "_commit_hash", None)
        base = {"name_or_path": model.config.name_or_path, "revision": revision, "commit": commit, **fingerprint(model)}
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
        self._check_fit(model_shape(model), {"name_or_path": model.config.name_or_path, **fingerprint(model)}, "model")

    def check_beside(self, other: "RetentionGates") -> None:
        """Refuse gates that were trained for another base than these.

        Raises:
            ValueError: naming both values of the first thing that differs.
        """
        self._check_fit(other.shape, other.base, "base of the others")

    def _check_fit(self, shape: ModelShape, base: dict[str, Any], whose: str) -> None:
        for field, word in (
            ("model_type", "family"),
            ("num_layers", "evictable layers"),
            ("num_kv_heads", "KV heads per layer"),
            ("num_heads", "query heads per layer"),
            ("head_dim", "features per head"),
            ("hidden_size", "hidden features"),
            ("layers", "evictable layer indices"),
        ):
            ours, theirs = getattr(self.shape, field), getattr(shape, field)
            if ours != theirs:
                raise ValueError(
                    f"gates were trained for {word} {ours}, the {whose} has {theirs}; load the matching base or gates"
                )
        for key in ("config_hash", "weight_hash"):
            if self.base.get(key) is not None and base.get(key) is not None and self.base[key] != base[key]:
                raise ValueError(
                    f"gates were trained on base {self.base.get('name_or_path')!r} ({key} {self.base[key]}), the {whose} is "
                    f"{base.get('name_or_path')!r} ({key} {base[key]}); load the base they were trained on"
                )

    def with_memory(self, trained: "RetentionGates") -> "RetentionGates":
        """These gates, with the memory of evicted tokens that others were trained with; copies.

        A memory learned what its own gates evict; beside gates that evict something else the record says so.

        Raises:
            ValueError: when the others have no memory, or were trained for another base.
        """
        if trained.memory is None:
            raise ValueError("expected gates with a memory, got some without; train one (python train.py memory=...)")
        self.check_beside(trained)
        merged, own = deepcopy(self), self.stack.state_dict()
        merged.memory = deepcopy(trained.memory).to(next(self.parameters()).device)
        theirs = trained.stack.state_dict()
        same = own.keys() == theirs.keys() and all(
            x.shape == theirs[name].shape and bool((x.cpu() == theirs[name].cpu()).all()) for name, x in own.items()
        )
        told = deepcopy(trained.training_record.get("memory", {}))
        merged.training_record["memory"] = told | ({} if same else {"trained_beside_these_gates": False})
        return merged

    def tensors(self) -> dict[str, Tensor]:
        """Tensors under their artefact names: `layers.<i>.<param>` and, stored once, `shared.<param>`."""
        memory = {} if self.memory is None else self.memory.state_dict(prefix="memory.")
        return dict(self.stack.state_dict()) | memory

    def conventions(self) -> dict[str, Any]:
        """What the numbers mean, as artefacts say it."""
        token = "the token behind it" if self.config.delayed else "the token itself"
        return {
            "log_beta": "fp32, at most 0",
            "eviction_age": "seen - position",
            "age_offset": 0,
            "score_time": f"when {token} is fed, off its attention input behind the input norm",
        }

    def card_config(self, storage: str = "float32") -> dict[str, Any]:
        """Everything `gate_config.json` holds."""
        from retention.provenance import package_versions

        return {
            "format_version": checkpoint.FORMAT_VERSION,
            "base": self.base,
            "shape": self.shape.to_dict(),
            "gate": self.config.to_dict(),
            "memory": None if self.memory is None else self.memory.config.to_dict(),
            "training": self.training_record,
            "conventions": self.conventions(),
            "storage": storage,
            "versions": package_versions(),
        }

    def save_pretrained(self, save_directory: str | Path, *, storage: str = "float32", **hub: Any) -> str | None:
        """Write the artefact atomically; with `push_to_hub=True` also upload it.

        `storage` is how tensors lie in the file: float32, bfloat16, float16, or int8 with a scale for each row.

        Raises:
            ValueError: for another storage, or values that it cannot hold.
        """
        from retention.gates.card import model_card

        folder, storage = Path(save_directory), (hub.pop("model_card_kwargs", None) or {}).get("storage", storage)
        config = self.card_config(storage)
        checkpoint.write(folder, config, self.tensors(), model_card(config))
        if not hub.pop("push_to_hub", False):
            return None
        return self.push_to_hub(hub.pop("repo_id", None) or folder.name, storage=storage, **hub)

    def push_to_hub(self, repo_id: str, *, storage: str = "float32", **hub: Any) -> str:
        """Upload the artefact; further arguments as in huggingface_hub's mixin. Returns the commit's address."""
        return super().push_to_hub(repo_id, model_card_kwargs={"storage": storage}, **hub)  # it calls save_pretrained

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> "RetentionGates":  # type: ignore[override]  # ours
        """Read an artefact from a folder or a hub id; nothing in it is executed.

        Raises:
            ValueError: when it is missing, damaged, of a newer format, or its tensors do not fit its config.
        """
        return gates_of(cls, folder_of(name, list(checkpoint.FILES), **hub))
