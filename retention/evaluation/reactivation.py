"""What an eviction costs and a memory gives back: missing mass, output error, and evicted tokens that matter later.

Everything is measured against a full-cache pass over a context with its turns. A token evicted from a head's entry is
*reactivated* at a later query t if the full attention of its query group, on average, puts it among the k largest
(k = what the head kept) or above `1 / (t + 1)`. These definitions are ours; no published value is comparable.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retention.attach.capture import Capture
from retention.attach.simulate import SimulatedEviction, after_eviction
from retention.cache.recall import attention_with_lse
from retention.memory import RetentionMemory
from retention.ops.observe import attention_rows


@dataclass
class Look:
    """One layer after an eviction, over all real queries of a batch behind it; heads are query heads unless said."""

    mass: Float[Tensor, "queries heads"]
    """Attention of the full cache on what was evicted: the missing mass."""
    visual_mass: Float[Tensor, "queries heads"]
    """The part of it on evicted visual tokens."""
    estimated: Float[Tensor, "queries heads"]
    """The missing mass that the memory estimates; 0 without one."""
    full: Float[Tensor, "queries heads"]
    """Norm of the output of the full cache."""
    bare: Float[Tensor, "queries heads"]
    """Norm of the error of the output over what was kept."""
    error: Float[Tensor, "queries heads"]
    """The same with the memory; without one the same as `bare`."""
    reactivating: Bool[Tensor, "queries heads"]
    """Whether the query reactivates any token of the head."""
    reactivated_mass: Float[Tensor, "queries heads"]
    """Attention of the full cache on tokens that are reactivated at some query."""
    evicted: Int[Tensor, ""]
    """Entries evicted, over rows and KV heads."""
    reactivated: Int[Tensor, ""]
    """Those among them that are reactivated."""
    answering: Int[Tensor, ""]
    """Those among these that are evidence of a turn."""
    delay: Float[Tensor, " reactivated"]
    """Tokens between the eviction and the first query that reactivates each."""


def look_after(
    capture: Capture,
    eviction: SimulatedEviction,
    memory: RetentionMemory | None = None,
    evidence: Bool[Tensor, "batch tokens"] | None = None,
) -> list[Look]:
    """Every layer of a captured pass, as if its contexts had been evicted before the turns."""
    return [_look(capture, eviction, number, memory, evidence) for number in range(len(capture.layers))]


@torch.no_grad()
def _look(
    capture: Capture,
    eviction: SimulatedEviction,
    number: int,
    memory: RetentionMemory | None,
    evidence: Bool[Tensor, "batch tokens"] | None,
) -> Look:
    layer, first, real = capture.layers[number], eviction.first, eviction.later()
    kv_heads, given = layer.key.shape[1], (layer.query, layer.key, layer.value, layer.scaling)
    later, everything = layer.query[:, :, first:], eviction.visible(None)
    rows = attention_rows(later, layer.key, everything, layer.scaling) * real[:, None, None, :, None]
    gone = eviction.context[:, None] & ~eviction.kept[number]
    full, full_lse = attention_with_lse(later, layer.key, layer.value, everything, layer.scaling)
    bare, bare_lse = after_eviction(None, eviction, number, *given)
    out, lse = (bare, full_lse) if memory is None else after_eviction(memory.layer(number), eviction, number, *given)

    group = rows.mean(2)
    alive = _reactivations(group, gone, eviction.kept[number].sum(-1), real, capture)
    revived = alive.any(2)
    when = torch.where(revived, alive.long().argmax(2), 0)
    seen = real.long().cumsum(1).gather(1, when.flatten(1)).view(when.shape)
    shown = revived if evidence is None else revived & evidence[:, None]

    def mass(of: Bool[Tensor, "batch kv_heads tokens"]) -> Tensor:
        return (rows * of[:, :, None, None]).sum(-1).flatten(1, 2)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[real]

    estimated = torch.zeros_like(lse) if memory is None else 1 - (bare_lse - lse).exp()
    per_head = alive.any(3).repeat_interleave(layer.query.shape[1] // kv_heads, 1)
    state = eviction.states[number]
    return Look(
        mass=flat(mass(gone)),
        visual_mass=flat(mass(gone & state.visual)),
        estimated=flat(estimated),
        full=flat(full.norm(dim=-1)),
        bare=flat((bare - full).norm(dim=-1)),
        error=flat((out - full).norm(dim=-1)),
        reactivating=flat(per_head),
        reactivated_mass=flat(mass(revived)),
        evicted=gone.sum(),
        reactivated=revived.sum(),
        answering=shown.sum(),
        delay=seen[revived].float(),
    )


def _reactivations(
    group: Float[Tensor, "batch kv_heads queries tokens"],
    gone: Bool[Tensor, "batch kv_heads tokens"],
    kept: Int[Tensor, "batch kv_heads"],
    real: Bool[Tensor, "batch queries"],
    capture: Capture,
) -> Bool[Tensor, "batch kv_heads queries tokens"]:
    """Where an evicted token is among the `kept` largest of a query, or above `1 / (t + 1)`."""
    assert capture.positions is not None
    ordered = group.sort(-1, descending=True).values
    rank = (kept.clamp(1, group.shape[-1]) - 1)[:, :, None, None].expand(*group.shape[:3], 1)
    position = capture.positions[:, -group.shape[2] :]
    even = 1 / (position + 1).to(group.dtype)[:, None, :, None]
    large = (group >= ordered.gather(-1, rank).clamp(min=1e-20)) | (group > even)
    return large & gone[:, :, None] & real[:, None, :, None]


def figures(looks: Iterable[Look], heads: Sequence[int] | None = None) -> dict[str, float | None]:
    """What some layers and batches say together, of all query heads or of some; None where there is nothing to say."""
    looks = list(looks)
    chosen = slice(None) if heads is None else list(heads)
    joined = {
        field.name: torch.cat([getattr(x, field.name)[:, chosen].flatten() for x in looks])
        for field in fields(Look)
        if getattr(looks[0], field.name).dim() == 2
    }
    evicted, reactivated, answering = (
        sum(int(getattr(x, name)) for x in looks) for name in ("evicted", "reactivated", "answering")
    )
    mass, estimated, full, bare, error, live = (
        joined[name] for name in ("mass", "estimated", "full", "bare", "error", "reactivating")
    )
    delay = torch.cat([x.delay for x in looks])
    spread = mass.var() if mass.numel() > 1 else torch.zeros(())
    both = torch.stack([mass, estimated])
    known = float(spread) > 0 and float(estimated.var()) > 0
    return {
        "missing_mass": float(mass.mean()),
        "missing_mass_p90": float(mass.quantile(0.9)) if mass.numel() < 2**24 else None,
        "missing_mass_visual": float(joined["visual_mass"].mean()),
        "missing_mass_text": float((mass - joined["visual_mass"]).mean()),
        "error_bare": float(bare.sum() / full.sum()),
        "error": float(error.sum() / full.sum()),
        "recovered": _recovered(error, bare),
        "mass_slope": float(both.cov()[0, 1] / spread) if known else None,
        "mass_correlation": float(both.corrcoef()[0, 1]) if known else None,
        "reactivation_rate": reactivated / evicted if evicted else None,
        "reactivated_mass": float(joined["reactivated_mass"].mean()),
        "reactivation_delay": float(delay.mean()) if delay.numel() else None,
        "reactivated_evidence": answering / reactivated if reactivated else None,
        "recovered_reactivating": _recovered(error[live], bare[live]),
    }


def _recovered(error: Float[Tensor, " some"], bare: Float[Tensor, " some"]) -> float | None:
    """`1 - |O - o_full| / |o_R - o_full|`, sums over queries: 0 is plain eviction, 1 exact, below 0 harmful."""
    total = float(bare.sum())
    return 1 - float(error.sum()) / total if total > 0 else None
