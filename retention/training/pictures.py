"""Pictures while training: what held-out contexts would keep at the budget, by layer and head, modality and place."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from retention.attach.hard import evicting
from retention.budget import Budget
from retention.cache.config import CacheConfig
from retention.data.render import Rendered
from retention.gates import RetentionGates
from retention.policies import Policy
from retention.tasks.answering import prefill
from retention.training.devices import rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACES = 20
"""Equal parts of a context that positions are counted in."""


@dataclass
class Survival:
    """Shares of a batch of contexts that a cache keeps; not a number where there is nothing to keep."""

    heads: Float[Tensor, "layers kv_heads"]
    text: Float[Tensor, " layers"]
    vision: Float[Tensor, " layers"]
    places: Float[Tensor, " places"]
    """From a context's first tokens to its last."""


def survival(
    kept: Bool[Tensor, "layers batch kv_heads positions"],
    visual: Bool[Tensor, "batch positions"],
    real: Bool[Tensor, "batch positions"],
) -> Survival:
    """Shares of the `real` positions that are kept; the others lie behind shorter rows."""

    def share(part: Tensor) -> Tensor:
        """By layer and head, of the positions [batch, positions] of a part."""
        return (kept & part[:, None]).sum((1, 3)) / part.sum()

    lengths = real.sum(1, keepdim=True)
    place = (torch.arange(real.shape[1], device=real.device) * PLACES).expand(real.shape) // lengths.clamp(min=1)
    places = [share(real & (place == i)).mean() for i in range(PLACES)]
    text, vision = (share(real & part).mean(1) for part in (~visual, visual))
    return Survival(share(real), text, vision, torch.stack(places))


@torch.no_grad()
def survival_of(
    model: "PreTrainedModel", gates: RetentionGates, policy: Policy, budget: Budget, contexts: Rendered
) -> Survival:
    """Prefill contexts, evict down to the budget, count what is left."""
    with evicting(model, policy, CacheConfig(budget), gates=gates) as cache:
        prefill(model, cache, contexts)
        kept = cache.kept_table().cpu()
    real, visual = torch.zeros((2, *kept.shape[1::2]), dtype=torch.bool)
    for row, mask in enumerate(contexts.inputs["attention_mask"].bool()):  # positions count no padding
        real[row, : int(mask.sum())] = True
        visual[row, : int(mask.sum())] = contexts.visual[row][mask]
    return survival(kept, visual, real)


def draw(shares: Survival, path: Path, title: str) -> Path:
    """One picture of three panels."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    heads, kinds, places = figure.subplots(1, 3)
    image = heads.imshow(100 * shares.heads.numpy(), vmin=0, cmap="viridis", aspect="auto")
    heads.set(xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=heads).set_label("kept (%)")
    layers = torch.arange(len(shares.text))
    for name, values, shift in (("text", shares.text, -0.2), ("vision", shares.vision, 0.2)):
        kinds.bar((layers + shift).numpy(), 100 * values.nan_to_num().numpy(), width=0.4, label=name)
    kinds.set(xlabel="layer", ylabel="kept (%)")
    kinds.legend()
    middles = 100 * (torch.arange(PLACES) + 0.5) / PLACES
    places.plot(middles.numpy(), 100 * shares.places.numpy())
    places.set(xlabel="place in the context (%)", ylabel="kept (%)", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")
    return path


class Pictures(L.Callback):
    """Every `every` steps a picture in the folder, shown wherever the run is tracked."""

    def __init__(
        self, measure: Callable[[], Survival], every: int, folder: Path, show: Callable[[Path, int], None], title: str
    ) -> None:
        self.measure, self.every, self.folder, self.show, self.title = measure, every, folder, show, title

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """All processes evict, since the base may be shared out; the first draws."""
        step = trainer.global_step
        if step % self.every:
            return
        shares = self.measure()
        if rank() == 0:
            self.show(draw(shares, self.folder / f"step={step}.png", f"step {step}: {self.title}"), step)
