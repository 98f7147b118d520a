"""What Triton kernels share: the compiler, which the first launch imports, and the sides of their tiles."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@cache
def has_triton() -> bool:
    """Whether fused kernels can be compiled here."""
    return find_spec("triton") is not None


def compiler(device_type: str) -> tuple[Any, Any]:
    """`triton` and `triton.language`; `TRITON_INTERPRET=1`, set before, runs kernels on a CPU.

    Raises:
        ValueError: if triton is missing, or if it would compile for another device than CUDA.
    """
    try:
        triton, language = import_module("triton"), import_module("triton.language")
    except ModuleNotFoundError as error:
        raise ValueError("expected the package triton, found none; install it or take another form") from error
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"expected CUDA tensors, got {device_type}; or set TRITON_INTERPRET=1 before the start")
    return triton, language


def power(size: int) -> int:
    """The least power of two that holds `size` and is at least 16, the least side of a tensor-core product."""
    return max(16, 1 << (size - 1).bit_length())
