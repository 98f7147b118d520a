"""How tensors lie in an artefact: float32, a half-precision format, or 8-bit integers; they are read as float32."""

from collections.abc import Mapping

import torch
from torch import Tensor

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
STORAGES = ("float32", *HALVES, "int8")
SCALE, LEVELS, SHORTEST = ".scale", 127, 32


def packed(tensors: Mapping[str, Tensor], storage: str) -> dict[str, Tensor]:
    """Tensors as they are stored.

    `int8` is symmetric, with one fp32 scale per row: `x ~ scale * q`, `scale = max |x| / 127`. Vectors, rows shorter
    than 32, and last projections (what lies beside an offset) stay in float32.

    Raises:
        ValueError: for an unknown storage, or values that it cannot hold.
    """
    if storage not in STORAGES:
        raise ValueError(f"expected storage {', '.join(STORAGES[:-1])} or {STORAGES[-1]}, got {storage!r}")
    wide = {name: x.detach().cpu().float().contiguous() for name, x in tensors.items()}
    if not all(bool(x.isfinite().all()) for x in wide.values()):
        raise ValueError("expected finite gates, got some that are not; they cannot be saved")
    if storage in HALVES:
        found = {name: x.to(HALVES[storage]) for name, x in wide.items()}
        lost = [name for name, x in found.items() if not bool(x.isfinite().all())]
        if lost:
            raise ValueError(f"{lost[0]} holds values too large for {storage}; save with storage=bfloat16")
        return found
    if storage == "float32":
        return wide
    found = {}
    for name, x in wide.items():
        if _rounds(name, x, wide):
            scale = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
            found[name] = (x / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)
            found[name + SCALE] = scale.squeeze(-1)
        else:
            found[name] = x
    return found


def unpacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors of whatever storage; `names` and `shapes` are those of `layout`."""
    found = {}
    for name, shape in layout({name: (tuple(x.shape), x.dtype is torch.int8) for name, x in stored.items()}).items():
        x = stored[name].float()
        found[name] = (x * stored[name + SCALE].float()[..., None]).view(shape) if name + SCALE in stored else x
    return found


def layout(stored: Mapping[str, tuple[tuple[int, ...], bool]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a file holds, from those of what is stored and whether it is in 8 bits.

    Raises:
        ValueError: for 8-bit integers without a scale for each row.
    """
    found = {}
    for name, (shape, rounded) in stored.items():
        if rounded and stored.get(name + SCALE) != (shape[:-1], False):
            raise ValueError(f"{name[:80]!r} has no scale for each row")
        if not (name.endswith(SCALE) and stored.get(name.removesuffix(SCALE), ((), False))[1]):
            found[name] = shape
    return found


def _rounds(name: str, x: Tensor, beside: Mapping[str, Tensor]) -> bool:
    """Whether 8 bits pay and do no harm."""
    return x.dim() > 1 and x.shape[-1] >= SHORTEST and f"{name.rpartition('.')[0]}.offset" not in beside
