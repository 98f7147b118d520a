"""InfiniPot-V: patches that changed since, then patches whose values are large (arXiv 2506.15745)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.ops.frames import frame_table, likeness, pooled
from retention.policies.base import Policy
from retention.types import KVState

RECENT, KERNELS = 2.0, ((7, 7, 7), (1, 5, 5), (1, 1, 3), (1, 1, 1))


@dataclass
class InfiniPotV(Policy):
    """TaR for `tar_ratio` of a head's budget, VaN for the rest; the images of the prompts, in order, are the frames.

    TaR: `s_p = -mean over recent frames of cos(k of patch p, k of the same patch)`; patches of the recent frames
    themselves (the newest `recent_frames` of all) come first, newest ahead. VaN: `||v||_2`, averaged over neighbours in
    frames, rows and columns (7 each) in the first quarter of the layers, rows and columns (5), the line of patches (3),
    none in the last. Text comes before all patches, inside the budget, as system tokens do in the paper. Reads no
    attention. Made for a fixed camera: what moves as a whole looks changed everywhere.

    A frame is a run of visual tokens, so images with nothing between them are one; patches are matched by their place
    in the run. A run of square length is a square grid, any other a line, pooled along it. Where frames differ in size,
    patches are matched among frames of their size only (without any, they count as changed neither more nor less, 0),
    and neighbours are those in the same frame. With a single frame there is nothing to compare, and VaN takes all.

    Differs from the paper, which compresses its own visual memory whenever it is full: it runs when the cache evicts
    (`cache.chunk_by_image` comes close), the text counts in the first share, and means are over what a head still holds.
    Written from the formulas alone.
    """

    collector = "keys_values"
    first_share = 0.5

    tar_ratio: float = 0.5
    """Part of the budget that goes by TaR."""
    recent_frames: float = 0.25
    """Part of all frames that others are compared with; at least one."""

    def __post_init__(self) -> None:
        for name in ("tar_ratio", "recent_frames"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected infinipot_v.{name} between 0 and 1, got {getattr(self, name)}")
        vars(self)["first_share"] = self.tar_ratio

    def score(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        """How much a patch changed; VaN in rows of fewer than two frames."""
        frame, place, size = self._frames(kv)
        held = kv.valid & kv.visual
        frames = frame.amax((1, 2)) + 1
        recent = frame >= (frames - (self.recent_frames * frames).long().clamp(min=1))[:, None, None]
        alike = likeness(kv.keys, held, frame, place, size, recent & held)
        changed = torch.where(recent & held, RECENT, -alike)
        several = (frames > 1)[:, None, None]
        return changed if several.all() else torch.where(several, changed, self._norms(kv))

    def second_score(
        self, kv: KVState, score: Float[Tensor, "batch kv_heads keys"]
    ) -> Float[Tensor, "batch kv_heads keys"]:
        """Norms of values, averaged over neighbours."""
        return self._norms(kv)

    def tiers(self, kv: KVState) -> Int[Tensor, "batch kv_heads keys"]:
        """Text before images."""
        return (~kv.visual).long()

    def _norms(self, kv: KVState) -> Float[Tensor, "batch kv_heads keys"]:
        reach = KERNELS[4 * kv.layer // max(kv.layers, kv.layer + 1)]
        norms = kv.values.float().norm(dim=-1)
        return pooled(norms, kv.valid & kv.visual, *self._frames(kv), reach)

    def _frames(
        self, kv: KVState
    ) -> tuple[
        Int[Tensor, "batch kv_heads keys"], Int[Tensor, "batch kv_heads keys"], Int[Tensor, "batch kv_heads keys"]
    ]:
        """Frame, place in it, and size of it for every entry; read off the entries where the tokens are not known."""
        visual = _by_position(kv) if kv.looked is None else kv.looked()
        index = kv.positions.clamp(0, visual.shape[1] - 1).flatten(1)
        found = (x.gather(1, index).view(kv.positions.shape) for x in frame_table(visual))
        frame, place, size = (
            torch.where(kv.valid & kv.visual, x, other) for x, other in zip(found, (-1, 0, 0), strict=True)
        )
        return frame, place, size


def _by_position(kv: KVState) -> Bool[Tensor, "batch positions"]:
    """Positions that any head holds a visual entry of."""
    length = max(int(kv.positions.max()) + 1, 1)
    slots = torch.where(kv.valid & kv.visual, kv.positions, length).flatten(1)
    table = torch.zeros(len(slots), length + 1, dtype=torch.bool, device=slots.device)
    return table.scatter(1, slots, True)[:, :-1]
