"""What all importers share: tensors read from files, taken by name and shape, and the gates made of them."""

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retention.gates import GateConfig, RetentionGates
from retention.models.family import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICKLED = (".pt", ".pth", ".bin")
Wanted = Callable[[str], bool]


class Layout:
    """Named tensors of a checkpoint, each taken once, with its expected shape."""

    def __init__(self, tensors: Mapping[str, Any], source: str) -> None:
        self.tensors, self.source = dict(tensors), source
        self.taken: set[str] = set()

    def take(self, key: str, *shape: int) -> Float[Tensor, "..."]:
        """A tensor in fp32.

        Raises:
            ValueError: when it is missing, no tensor of numbers, or of another shape.
        """
        found = self.tensors.get(key)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = "none" if found is None else f"{getattr(found, 'dtype', type(found).__name__)}"
            raise ValueError(f"expected a tensor {key} of floats in {self.source}, got {kind}")
        if found.layout is not torch.strided or found.is_meta:
            raise ValueError(f"expected every number of {key} in {self.source}, got a tensor that is sparse or empty")
        if tuple(found.shape) != shape:
            raise ValueError(
                f"expected {key} of shape {shape} for this model, got {tuple(found.shape)}; these gates belong to another base"
            )
        self.taken.add(key)
        return found.detach().to("cpu", torch.float32)

    def size(self, key: str, axis: int) -> int:
        """How long an axis of a tensor is, for what its shape alone tells.

        Raises:
            ValueError: when it is missing or has no such axis, or nothing along it.
        """
        found = self.tensors.get(key)
        if not isinstance(found, Tensor) or found.dim() <= axis or not found.shape[axis]:
            raise ValueError(f"expected a tensor {key} with {axis + 1} or more axes in {self.source}, got none")
        return found.shape[axis]

    def check_rest(self, spared: Wanted = lambda key: False) -> None:
        """Refuse tensors nobody took.

        Raises:
            ValueError: naming the first.
        """
        rest = sorted(key for key in self.tensors if key not in self.taken and not spared(key))
        if rest:
            raise ValueError(
                f"{self.source} holds {rest[0]}, which gates of this model do not have; they belong to another base or "
                "a newer layout"
            )


def layer_keys(tensors: Mapping[str, Any], inside: str) -> dict[tuple[int, str], str]:
    """Full names of `layers.<i>.<inside>.<rest>`, whatever stands before, by layer and rest.

    Raises:
        ValueError: when one name stands for a layer twice.
    """
    found: dict[tuple[int, str], str] = {}
    for key in tensors:
        match = re.fullmatch(rf"(?:.*\.)?layers\.(\d+)\.{re.escape(inside)}\.(.+)", key)
        if match is None:
            continue
        place = int(match[1]), match[2]
        if place in found:
            raise ValueError(f"expected one {inside}.{place[1]} of layer {place[0]}, got {found[place]} and {key}")
        found[place] = key
    return found


def by_layer(layout: Layout, inside: str) -> Layout:
    """The tensors of `layers.<i>.<inside>`, under `layers.<i>.<rest>`."""
    keys = layer_keys(layout.tensors, inside)
    if not keys:
        raise ValueError(f"expected tensors named layers.<number>.{inside}.... in {layout.source}, got none")
    return Layout({f"layers.{i}.{rest}": layout.tensors[key] for (i, rest), key in keys.items()}, layout.source)


def spared_layers(model: "PreTrainedModel", layers: tuple[int, ...]) -> Wanted:
    """Whether a name `layers.<i>...` is of a layer of the model that is never evicted, whose gate is not needed."""
    whole = decoder_of(model).config.num_hidden_layers

    def spared(key: str) -> bool:
        match = re.match(r"layers\.(\d+)\.", key)
        return match is not None and int(match[1]) < whole and int(match[1]) not in layers

    return spared


def read_tensors(path: Path | str, wanted: Wanted = lambda key: True) -> dict[str, Any]:
    """The wanted tensors of a file or of all safetensors of a folder; nothing in them is executed.

    Of pickles (.pt, .pth, .bin) only tensors, numbers and containers are read, numpy arrays included.

    Raises:
        ValueError: when there is no such file, or it holds anything else.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"expected a checkpoint or a folder with *.safetensors, found none at {path}")
    found: dict[str, Any] = {}
    for file in files:
        more = _pickled(file) if file.suffix in PICKLED else _safe(file, wanted)
        twice = sorted(found.keys() & more.keys())
        if twice:
            raise ValueError(
                f"expected every tensor once in {path}, got {twice[0]} in several files; remove the others"
            )
        found |= more
    return {key: x for key, x in found.items() if wanted(key)}


def _safe(file: Path, wanted: Wanted) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if wanted(key)}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({str(error).splitlines()[0]})") from error


def _pickled(file: Path) -> dict[str, Any]:
    rebuild = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    arrays = [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype]  # by numpy 2, by numpy 1
    numbers = [np.dtypes.Float32DType, np.dtypes.Float64DType]
    try:
        _check_whole(file)
        with torch.serialization.safe_globals([*arrays, *numbers]):
            state = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251  (published so)
    except Exception as error:  # a foreign file may fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} holds no plain tensors ({reason}); nothing else is read") from error
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"expected named tensors in {file}, got {type(state).__name__} without names")
    return dict(state)


def _check_whole(file: Path) -> None:
    """Refuse archives that grow when they are opened; torch writes its own uncompressed."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as opened:
            size = sum(part.file_size for part in opened.infolist())
        if size > file.stat().st_size:
            raise ValueError(f"it unfolds to {size} bytes")


def imported(
    config: GateConfig,
    model: "PreTrainedModel",
    tensors: Mapping[str, Float[Tensor, "..."]],
    *,
    objective: str,
    score_kind: str,
    layout: str,
    published: str | None = None,
    **record: Any,
) -> RetentionGates:
    """Gates of ours with these tensors under their artefact names, and a record that says which policies rank by them.

    `published` are the settings of an evaluation that evicts by them as their authors do, where ours differ.

    Raises:
        ValueError: for numbers that are not finite.
    """
    for name, x in tensors.items():
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"expected finite numbers, got some in these gates that are not ({name}, as it would be here)"
            )
    gates = RetentionGates.for_model(config, model)
    gates.stack.load_state_dict(dict(tensors))
    told = {"layout": layout, "as_published": published, **record}
    told = {key: value for key, value in told.items() if value is not None}
    gates.training_record = {"objective": objective, "score_kind": score_kind, "imported": told}
    return gates.eval().requires_grad_(False)
