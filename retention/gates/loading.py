"""From an artefact to gates: settings, sizes and tensors are held against each other before anything is built."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from retention.checkpoint import Artefact, read, shown, typed
from retention.gates.calibration import Calibration
from retention.memory import MEMORIES, MemoryConfig, RetentionMemory, state_bytes
from retention.types import ModelShape, require

if TYPE_CHECKING:
    from retention.gates.base import RetentionGates

MOST, LARGEST_STATE = 1024, 4 * 2**30
"""Layers of a model, and bytes of a memory's state of one sequence, that no real artefact comes near."""
_TOLD = {"objective": str, "score_kind": str, "seed": int, "calibration": dict, "memory": dict}


def folder_of(name: str | Path, files: list[str], **hub: Any) -> Path:
    """A folder here, or a snapshot of these files of a hub repository; `hub` as in `snapshot_download`.

    Raises:
        ValueError: when it is neither.
    """
    name = name if isinstance(name, Path) else os.path.expanduser(name)  # Hydra's gates=~/... reaches no shell
    if Path(name).is_dir() or "/" not in str(name) or isinstance(name, Path) or str(name).startswith((".", "/")):
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=files, **hub))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"expected a folder or hub id of gates, got {str(name)!r}: no folder here, and the hub gave none "
            f"({type(error).__name__}); check the name, revision and connection"
        ) from error


def gates_of(kind: type["RetentionGates"], folder: Path) -> "RetentionGates":
    """The gates, and the memory beside them, of an artefact's folder.

    Raises:
        ValueError: when it is missing, damaged or newer, or its settings, sizes and tensors do not fit each other.
    """
    artefact = read(folder)
    try:
        shape = _shape(artefact)
        with torch.device("meta"):  # sizes are only compared: nothing is allocated for what a stranger's config asks
            blank = _blank(kind, artefact, shape)
            expected = {name: tuple(x.shape) for name, x in blank.tensors().items()}
            state = 0 if blank.memory is None else sum(_state(layer) for layer in blank.memory.layers)
            require([(state <= LARGEST_STATE, f"a memory of at most {LARGEST_STATE} bytes a sequence", state)])
        for why in _differences(artefact.shapes, expected):
            raise ValueError(f"the tensors in {folder} do not fit its config: {why}")
        gates = _blank(kind, artefact, shape)
    except (ArithmeticError, RuntimeError, TypeError) as error:
        raise ValueError(f"the config in {folder} describes no gates ({shown(str(error).splitlines()[0])})") from error
    _check_words(artefact, gates)
    tensors = artefact.tensors()
    gates.stack.load_state_dict({name: x for name, x in tensors.items() if not name.startswith("memory.")})
    if gates.memory is not None:
        own = {name.removeprefix("memory."): x for name, x in tensors.items() if name.startswith("memory.")}
        gates.memory.load_state_dict(own)
    gates.training_record = artefact.config["training"]
    return gates.eval()


def _shape(artefact: Artefact) -> ModelShape:
    shape = typed(ModelShape, artefact.config["shape"], "shape")
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.hidden_size
    require(
        [
            (min(sizes) > 0, "sizes above 0 in the artefact's shape", sizes),
            (
                shape.num_heads % shape.num_kv_heads == 0,
                "heads that KV heads divide in the artefact's shape",
                sizes[:2],
            ),
            (list(shape.layers) == sorted({x for x in shape.layers if x >= 0}), "ascending layers", shape.layers[:8]),
            (len(shape.layers) <= MOST, f"at most {MOST} layers in the artefact's shape", len(shape.layers)),
        ]
    )
    return shape


def _blank(kind: type["RetentionGates"], artefact: Artefact, shape: ModelShape) -> "RetentionGates":
    """Modules as the config describes them, on the device in force."""
    from retention.gates import gate_from_dict

    gates = kind(gate_from_dict(artefact.config["gate"]), shape, artefact.config["base"])
    if artefact.config.get("memory") is not None:
        gates.memory = RetentionMemory(_memory(artefact.config["memory"]), shape)
    return gates


def _memory(values: dict[str, Any]) -> MemoryConfig:
    name = str(values.get("name"))
    if name not in MEMORIES:
        raise ValueError(f"expected a memory among {', '.join(MEMORIES)}, got {shown(name)}; update retention")
    return typed(MEMORIES[name], {k: v for k, v in values.items() if k != "name"}, "memory")


def _state(layer: Any) -> int:
    """Bytes of the state that a layer of a memory would keep of one sequence."""
    return state_bytes(layer.empty(1, torch.device("meta")))


def _differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with the tensors of a file, in words."""
    for name, shape in expected.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != shape:
            yield f"{name} has shape {list(found[name])} in the file, {list(shape)} by the config"
    yield from (f"{shown(name)} belongs to no gate" for name in found if name not in expected)


def _check_words(artefact: Artefact, gates: "RetentionGates") -> None:
    """Refuse other conventions, whose scores would mean something else, and records of another kind."""
    config, ours = artefact.config, gates.conventions()
    for key, theirs in config["conventions"].items():
        if key not in ours or type(theirs) is not type(ours[key]) or theirs != ours[key]:
            raise ValueError(
                f"the gates in {artefact.folder} were made under the convention {shown(key)} {shown(theirs)}, this version "
                f"has {shown(ours.get(key))}; use the version that wrote them"
            )
    if not all(isinstance(value, str | None) for value in gates.base.values()):
        raise ValueError(f"expected names and hashes as the base of the gates in {artefact.folder}, got other values")
    for key, kind in _TOLD.items():
        if key in config["training"] and not isinstance(config["training"][key], kind):
            raise ValueError(
                f"expected training.{key} of the kind {kind.__name__} in {artefact.folder}, got "
                f"{shown(config['training'][key])}"
            )
    if "calibration" in config["training"]:
        curve = typed(Calibration, config["training"]["calibration"], "training.calibration")
        if len(curve.budgets) != len(curve.thresholds) or not curve.budgets or min(curve.budgets) <= 0:
            raise ValueError(
                f"expected a threshold for each budget above 0 in {artefact.folder}, got {len(curve.thresholds)} for "
                f"{len(curve.budgets)}; export the gates again"
            )
