"""Gates that a run goes on from: an artefact's, checked against model, settings and objective."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from retention.gates import RetentionGates
from retention.models.family import decoder_device
from retention.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trained_gates(config: TrainConfig, model: "PreTrainedModel", record: dict[str, Any]) -> RetentionGates:
    """The gates of `init_gates`, with the record of the training to come and of the one before.

    Raises:
        ValueError: when they do not fit the model, are of another architecture than `gate` says, were trained by an
            objective that ranks otherwise, or carry a memory, which training on would make stale.
    """
    assert config.init_gates is not None
    gates = RetentionGates.from_pretrained(config.init_gates)
    gates.check(model)
    own, wanted = ({"name": gate.name, **asdict(gate)} for gate in (gates.config, config.gate))
    differing = [name for name in wanted if own.get(name) != wanted[name] and name not in _START]
    if differing:
        name = differing[0]
        raise ValueError(
            f"expected init_gates of gate.{name} {wanted[name]}, got {own.get(name)}; give the gate settings that they "
            "were trained with"
        )
    ranked = config.objective.ranked_as or config.objective.name
    if gates.objective != ranked:
        raise ValueError(
            f"expected init_gates trained with objective {ranked}, got some of {gates.objective}; train some with "
            f"objective={ranked} first"
        )
    if gates.memory is not None:
        raise ValueError(
            "expected init_gates without a memory, whose evictions would change under it; name the gates it was "
            "trained on"
        )
    before = {k: v for k, v in gates.training_record.items() if k not in ("calibration", "validation", "task_settings")}
    gates.training_record = record | {"went_on_from": {"gates": config.init_gates, **before}}
    return gates.to(decoder_device(model)).train()


_START = ("init_half_life",)
"""Settings that only say where training starts."""
