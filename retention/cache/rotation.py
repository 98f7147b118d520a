"""Where cached keys are rotated to, and the turn that packs what an eviction keeps (`positions: packed`)."""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from retention.models.family import Rope
from retention.ops.rope import angles, packed_coordinates, turn_keys

Turn = Callable[[Tensor, Tensor], Tensor]
"""Re-rotates some of the kept keys, in place, given their numbers."""
BLOCK = 2**14
"""Keys turned at a time: angles are fp64 and would take more room than the keys themselves."""


class Rotation:
    """Rotary coordinates of the tail and the frequencies in force when its keys were written.

    One-dimensional coordinates are sequence indices, which the cache knows already; only those of several axes
    (M-RoPE) are recorded here.
    """

    def __init__(self, rope: Rope) -> None:
        self.rope = rope
        self.frequencies = [rope.frequencies()]
        """The sets of frequencies in force since the last eviction, the newest last."""
        self.versions: Int[Tensor, " columns"] = torch.zeros(0, dtype=torch.int16)
        """Which of them each column of the tail was written with."""
        self.coordinates: Int[Tensor, "axes batch columns"] | None = None
        self.next: Int[Tensor, " batch"] | None = None
        """Position of the next token, where coordinates are recorded."""
        self.reached: Int[Tensor, " batch"] | None = None

    def note(
        self,
        coordinates: Int[Tensor, "axes batch tokens"] | None,
        valid: Bool[Tensor, "batch tokens"],
        upcoming: Int[Tensor, " batch"] | None,
    ) -> None:
        """Told after a forward: where its tokens were rotated to, and the smallest coordinate known to follow.

        Unless told, what follows is taken to start behind the largest coordinate so far. Inside a prompt that is
        not so: the rest of an image lies at its start, and a clip's times outrun the text behind it.
        """
        if self.rope.changes and not torch.equal(now := self.rope.frequencies(), self.frequencies[-1]):
            self.frequencies.append(now)
        version = self.versions.new_full((valid.shape[1],), len(self.frequencies) - 1)
        self.versions = torch.cat([self.versions, version])
        if self.rope.axes == 1:
            return
        assert coordinates is not None, "the cache hands them over for several axes"
        past = coordinates[:, :, :0].int() if self.coordinates is None else self.coordinates
        self.coordinates = torch.cat([past, coordinates.int()], -1)
        reached = (coordinates.amax(0).masked_fill(~valid, -1)).amax(1) + 1
        self.reached = reached if self.reached is None else torch.maximum(self.reached, reached)
        self.next = self.reached if upcoming is None else upcoming

    def pack(
        self,
        kept: Int[Tensor, "axes batch kv_heads kept"] | None,
        positions: Int[Tensor, "batch kv_heads keys"],
        seen: Int[Tensor, " batch"],
        mask: Bool[Tensor, "batch kv_heads keys"],
    ) -> tuple[Int[Tensor, "axes entries"], Turn]:
        """New coordinates of what the mask keeps, and how to turn its keys there.

        `kept` are coordinates of entries that survived an earlier eviction; the rest of `positions` is the tail.
        """
        length = 0 if kept is None else kept.shape[-1]
        if self.coordinates is None:
            tail = positions[None, :, :, length:]
        else:
            tail = self.coordinates.long()[:, :, None].expand(-1, -1, positions.shape[1], -1)
        written = tail if kept is None else torch.cat([kept.long(), tail], -1)
        wanted = packed_coordinates(written, mask, seen if self.next is None else self.next)
        version = torch.cat([self.versions.new_zeros(length), self.versions])[torch.nonzero(mask)[:, -1]]
        before, after, frequencies = written[:, mask], wanted[:, mask], list(self.frequencies)

        def turn(keys: Tensor, which: Tensor) -> Tensor:
            for start in range(0, len(which), BLOCK):
                part = which[start : start + BLOCK]
                angle = angles(after[:, part], frequencies[-1], self.rope.axis)
                for number in range(len(frequencies)):
                    old = slice(None) if len(frequencies) == 1 else version[part] == number
                    angle[old] -= angles(before[:, part[old]], frequencies[number], self.rope.axis)
                keys[start : start + BLOCK] = turn_keys(keys[start : start + BLOCK], angle)
            return keys

        return after.int(), turn

    def packed(self) -> None:
        """Told after all layers were packed: the tail is empty, and kept keys carry the newest frequencies."""
        self.versions = self.versions[:0]
        self.coordinates = None if self.coordinates is None else self.coordinates[:, :, :0]
        self.frequencies = self.frequencies[-1:]

    def fork(self) -> "Rotation":
        """An independent continuation."""
        twin = copy.copy(self)
        twin.frequencies = list(self.frequencies)
        return twin

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the given batch rows, in that order."""
        self.coordinates = None if self.coordinates is None else self.coordinates[:, rows]
        self.next = None if self.next is None else self.next[rows]
        self.reached = None if self.reached is None else self.reached[rows]

    def reset(self) -> None:
        """Forget what was cached."""
        self.packed()
        self.coordinates = self.next = self.reached = None
