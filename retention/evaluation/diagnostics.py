"""A closer look at the first contexts of a task: what every arm keeps of them, and how long the gates let tokens live."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int16, UInt8
from PIL import Image
from torch import Tensor

from retention.attach.hard import evicting
from retention.attach.stretch import stretched
from retention.cache.evicting import EvictingCache
from retention.data.evidence import token_grids
from retention.data.example import Example
from retention.data.render import Rendered, Renderer
from retention.evaluation.arms import Arm
from retention.evaluation.fidelity import Missing
from retention.evaluation.looks import BINS, FOLDER, Lives, Look, Shown, save_shown, slug
from retention.gates import RetentionGates
from retention.models import family_of
from retention.models.patches import patch_places
from retention.ops.decay import half_life
from retention.policies import POLICIES
from retention.tasks.answering import prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACES = 20
"""Equal parts of a context that positions are counted in."""
CONTEXTS = 2
"""Contexts of a task that are shown token by token."""
PIXELS = 224
"""Longest side of an image as it is shown."""
SPACED = ("\u0120", "\u2581")
"""What tokenizers begin a token with that follows a space."""


@dataclass
class Diagnostics:
    """Writes what one run's report is drawn from; what is there already is left."""

    folder: Path
    model: "PreTrainedModel"
    renderer: Renderer

    def wants(self, task: str, arm: Arm) -> bool:
        """Whether this arm was not looked at yet."""
        told = (str(arm.protocol), arm.name, arm.scope, arm.budget)
        return arm.name != "full" and not Look.file(self.folder, task, *told).exists()

    def note(self, task: str, arm: Arm, cache: EvictingCache, batch: Rendered) -> None:
        """What an arm's cache holds of a batch, right after the eviction of the contexts."""
        kept, seen, held = survival(cache, batch)
        told = (task, arm.name, arm.scope, str(arm.protocol), arm.budget)
        Look(*told, kept, seen, held, len(batch.lengths)).save(self.folder)

    def note_missing(self, task: str, arm: Arm, missing: Missing | None) -> None:
        """The full attention on what an arm evicted, by layer, head and modality, where it was measured."""
        if missing is not None:
            told = (str(arm.protocol), arm.name, arm.scope, arm.budget)
            arms = Look.file(self.folder, task, *told)
            missing.save(arms.parent.with_name("missing_mass") / arms.name)

    def note_contexts(self, task: str, batch: Rendered, gates: RetentionGates | None) -> None:
        """The contexts themselves, and half-lives by the gates where they decay."""
        place = self.folder / FOLDER / slug(task)
        if not (place / "contexts.npz").exists():
            save_shown(self.folder, task, shown_contexts(self.model, self.renderer.tokenizer, batch))
        if gates is not None and gates.decays and not (place / "gates.npz").exists():
            with stretched(self.model, batch.examples[0].stretch):
                lives(task, self.model, batch, gates).save(self.folder)


def survival(
    cache: EvictingCache, batch: Rendered
) -> tuple[Int[np.ndarray, "layers kv_heads places 2"], Int[np.ndarray, "places 2"], list]:
    """Kept tokens by layer, head, place and modality over all rows, tokens by place and modality, and tokens' own counts."""
    table = cache.kept_table().cpu()
    longest = max(batch.lengths)
    part = torch.zeros(len(batch.lengths), longest, 2 * PLACES)
    for row, length in enumerate(batch.lengths):
        visual = batch.visual[row][batch.inputs["attention_mask"][row].bool()].long()
        place = torch.arange(length) * PLACES // length
        part[row, torch.arange(length), 2 * place + visual] = 1
    counts = torch.einsum("lbhp,bpk->lhk", table[..., :longest].float(), part).round().long()
    sizes = part.sum((0, 1)).long()
    cells = table.shape[0] * table.shape[2]
    assert cells < 2**16
    held = [table[:, i, :, :n].sum((0, 1)).numpy().astype(np.uint16) for i, n in enumerate(batch.lengths[:CONTEXTS])]
    return counts.unflatten(-1, (PLACES, 2)).numpy(), sizes.view(PLACES, 2).numpy(), held


@torch.no_grad()
def lives(task: str, model: "PreTrainedModel", batch: Rendered, gates: RetentionGates) -> Lives:
    """Half-lives of all tokens of a batch, from a prefill that only the gates watch."""
    counts = []
    with evicting(model, POLICIES["full"](), gates=gates, extra_collectors=("gate",)) as cache:
        prefill(model, cache, batch)
        for layer in cache.evicting_layers:
            state = layer.state()
            assert state.log_beta is not None
            power = half_life(state.log_beta.clamp(max=-1e-9)).log2().floor().clamp(0, BINS - 1).long()
            spot = power + BINS * state.visual.long()
            rows = zip(spot.unbind(1), state.valid.unbind(1), strict=True)
            counts.append([torch.bincount(x[v], minlength=2 * BINS).cpu().view(2, BINS).numpy() for x, v in rows])
    return Lives(task, np.array(counts))


def shown_contexts(model: "PreTrainedModel", tokenizer: Any, batch: Rendered) -> list[Shown]:
    """The first contexts of a batch as a reader sees them."""
    ids, found = batch.inputs["input_ids"], []
    places = patch_places(family_of(model), model.config, ids, batch.inputs)
    for row, example in enumerate(batch.examples[:CONTEXTS]):
        mask = batch.inputs["attention_mask"][row].bool()
        visual = batch.visual[row][mask]
        own = _own(places[row][mask]) if places is not None and visual.any() else _squares(example, visual)
        turns = [
            {"question": turn.question, "answer": turn.answer, "evidence": evidence}
            for turn, evidence in zip(example.turns, batch.evidence[row], strict=True)
        ]
        texts = token_texts(tokenizer, ids[row][mask].tolist())
        found.append(Shown(example.id, texts, visual.numpy(), own, list(map(_small, example.images)), turns))
    return found


def _own(places: Tensor) -> Int16[np.ndarray, "tokens 3"] | None:
    """Image (counted within the row), row and column of each token; None for videos, whose frames are not images."""
    if int(places[:, 1].max()) > 0:
        return None
    image = torch.where(places[:, 0] >= 0, places[:, 0] - places[:, 0][places[:, 0] >= 0].min(), -1)
    return torch.stack([image, places[:, 2], places[:, 3]], -1).to(torch.int16).numpy()


def _squares(example: Example, visual: Bool[Tensor, " tokens"]) -> Int16[np.ndarray, "tokens 3"] | None:
    """The same from the number of tokens, where every image is a square of them; the finest resolution."""
    grids = token_grids(example, visual)
    if grids is None:
        return None
    places = np.full((len(visual), 3), -1, np.int16)
    for at, position in np.ndenumerate(grids[0]):
        places[position] = at
    return places


def _small(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    picture = Image.fromarray(image)
    picture.thumbnail((PIXELS, PIXELS))
    return np.asarray(picture)


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of every token, with the space before it where it has one."""
    raw = tokenizer.convert_ids_to_tokens(ids)
    apart = not any(token.startswith(SPACED) for token in tokenizer.get_vocab())
    texts = []
    for token, number in zip(raw, ids, strict=True):
        text = tokenizer.decode([number], skip_special_tokens=False)
        spaced = apart or token.startswith(SPACED)
        texts.append(f" {text}" if spaced and not text.startswith(" ") else text)
    return texts
