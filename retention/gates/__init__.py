"""The registry of gate architectures."""

from typing import Any

from retention.checkpoint import shown, typed
from retention.gates.architecture import GateConfig
from retention.gates.base import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.gates.fastkvzip import FastKVzip
from retention.gates.per_head import PerHead
from retention.gates.sets import GateSets
from retention.gates.trim import Trim

GATES: dict[str, type[GateConfig]] = {"dbtrim": DBTrim, "trim": Trim, "fastkvzip": FastKVzip, "per_head": PerHead}


def gate_from_dict(values: dict[str, Any]) -> GateConfig:
    """A gate config from the plain values of an artefact.

    Raises:
        ValueError: for an architecture or a field this version does not know.
    """
    name = values.get("name")
    if not isinstance(name, str) or name not in GATES:
        raise ValueError(
            f"expected a gate among {sorted(GATES)}, got {shown(name)}; the artefact may need a newer retention"
        )
    return typed(GATES[name], {key: value for key, value in values.items() if key != "name"}, "gate")


__all__ = ["GATES", "GateConfig", "GateSets", "RetentionGates", "gate_from_dict"]
