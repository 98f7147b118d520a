"""A tensor that grows along its third axis with room to spare, shared by forks until one of them writes."""

import copy

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def _own(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a view into a larger one that it would keep alive (fused projections)."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor


class Buffer:
    """`[batch, kv_heads, capacity, ...]`, of which the first `used` columns hold something."""

    def __init__(self, data: Shaped[Tensor, "batch kv_heads capacity ..."], used: int | None = None) -> None:
        self.data = _own(data)
        self.used = data.shape[2] if used is None else used
        self.shared = True  # the first tensor may be somebody else's

    @classmethod
    def empty(cls, like: Tensor, batch: int, kv_heads: int) -> "Buffer":
        """No columns yet, with the width, dtype and device of `like`."""
        return cls(like.new_empty(batch, kv_heads, 0, like.shape[-1]))

    @property
    def room(self) -> int:
        """Columns that can be written without a copy."""
        return 0 if self.shared else self.data.shape[2] - self.used

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return self.data.shape[-1] * self.data.element_size()

    def view(self) -> Shaped[Tensor, "batch kv_heads used ..."]:
        """What is held, without a copy."""
        return self.data if self.data.shape[2] == self.used else self.data[:, :, : self.used]

    def append(self, new: Shaped[Tensor, "batch kv_heads tokens ..."], spare: int) -> bool:
        """Add columns; where they do not fit, move to a tensor with `spare` columns more. True if it moved."""
        after = self.used + new.shape[2]
        moved = new.shape[2] > self.room
        if moved:
            larger = self.data.new_empty(*self.data.shape[:2], after + spare, *self.data.shape[3:])
            larger[:, :, : self.used] = self.view()
            self.data, self.shared = larger, False
        self.data[:, :, self.used : after] = new
        self.used = after
        return moved

    def fork(self) -> "Buffer":
        """An independent continuation; whoever writes first makes its own copy."""
        self.shared = True
        return copy.copy(self)

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "Buffer":
        """The given batch rows, in that order, with the same room."""
        picked = Buffer(self.data.index_select(0, rows), self.used)
        picked.shared = False
        return picked

    def rows(self) -> tuple[Tensor, tuple[int, int, int]]:
        """All cells as a table of rows [cells, width], and how many rows one step along each axis is; no copy."""
        data = self.view()
        width = data.shape[3]
        if data.stride(3) != 1 or any(step % width for step in data.stride()[:3]):
            data = data.contiguous()
        steps = tuple(step // width for step in data.stride()[:3])
        if data.numel() == 0:
            return data.new_empty(0, width), (0, 0, 0)
        last = sum(step * (size - 1) for step, size in zip(steps, data.shape[:3], strict=True))
        return torch.as_strided(data, (last + 1, width), (width, 1)), (steps[0], steps[1], steps[2])
