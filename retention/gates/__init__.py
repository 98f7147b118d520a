"""The registry of gate architectures."""

from typing import Any

from retention.gates.architecture import GateConfig
from retention.gates.base import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.gates.fastkvzip import FastKVzip
from retention.gates.per_head import PerHead
from retention.gates.trim import Trim

GATES: dict[str, type[GateConfig]] = {"dbtrim": DBTrim, "trim": Trim, "fastkvzip": FastKVzip, "per_head": PerHead}


def gate_from_dict(values: dict[str, Any]) -> GateConfig:
    """A gate config from the plain values of an artefact.

    Raises:
        ValueError: for an architecture or a field this version does not know.
    """
    fields = dict(values)
    name = fields.pop("name", None)
    if name not in GATES:
        raise ValueError(
            f"expected a gate among {sorted(GATES)}, got {name!r}; the artefact may need a newer retention"
        )
    try:
        return GATES[name](**fields)
    except TypeError as error:
        raise ValueError(f"the artefact's gate has fields this version does not know: {error}") from error


__all__ = ["GATES", "GateConfig", "RetentionGates", "gate_from_dict"]
