"""What a cache was fed and no second pass has read yet, for policies that feed it once more behind itself."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from retention.policies.collect import Foresight, Repetition
from retention.types import KVState

if TYPE_CHECKING:
    from retention.cache.evicting import EvictingCache

Reader = Callable[["EvictingCache", Repetition | Foresight], None]


@dataclass
class Part:
    """Some columns as the decoder got them."""

    fed: Shaped[Tensor, "batch tokens ..."]
    """Token ids, or embeddings."""
    places: Int[Tensor, "axes batch tokens"]
    """Rotary coordinates."""
    visual: Bool[Tensor, "batch tokens"] | None = None
    """Tokens that `deep` belongs to."""
    deep: list[Float[Tensor, "visual hidden"]] | None = None
    """What the model adds to the hidden states of visual tokens behind its first layers, row by row."""

    def named(self) -> dict[str, Tensor]:
        """Every tensor of it."""
        visual = {} if self.visual is None else {"visual": self.visual}
        deep = {f"deep{number:03}": level for number, level in enumerate(self.deep or [])}
        return {"fed": self.fed, "places": self.places} | visual | deep


@dataclass
class Answers:
    """Questions with their answers as one dialogue per row, right-padded."""

    ids: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]
    reading: Bool[Tensor, "batch tokens"]
    """Tokens behind which the model says a token of an answer."""

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "Answers":
        """The given rows, in that order."""
        return Answers(self.ids[rows], self.valid[rows], self.reading[rows])


class Inputs:
    """The newest columns as they were fed, from `first` on; forgotten once a second pass has read them."""

    def __init__(self) -> None:
        self.wanted = False
        """Whether anybody may ask for them."""
        self.parts: list[Part] = []
        self.first = 0
        self.next: Int[Tensor, " batch"] | None = None
        """Rotary coordinate of the next token; None before the first forward."""
        self.answers: Answers | None = None
        """What will be asked and answered, where an evaluation tells."""

    def keep(self, *, wanted: bool) -> None:
        """Say whether what is fed is to be remembered; what is not wanted any more is dropped."""
        self.wanted = wanted
        self.parts = self.parts if wanted else []

    def note(self, fed: Mapping[str, Any], columns: int) -> None:
        """Remember the arguments of a forward; `columns` tokens were fed before it."""
        inputs: Tensor = fed["input_ids"] if fed.get("inputs_embeds") is None else fed["inputs_embeds"]
        places = fed.get("position_ids")
        rows, tokens = inputs.shape[:2]
        if places is None:
            places = torch.arange(columns, columns + tokens, device=inputs.device)[None]
        places = places[-3:] if places.dim() == 3 else places[None]
        places = places.expand(-1, rows, -1)
        self.next = places.amax((0, 2)) + 1
        if not self.wanted:
            return
        if not self.parts:
            self.first = columns
        self.parts.append(Part(inputs, places, fed.get("visual_pos_masks"), fed.get("deepstack_visual_embeds")))

    def read(self, columns: int) -> None:
        """Forget all parts: up to `columns` everything was read."""
        self.parts, self.first = [], columns

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the given batch rows, in that order."""
        self.parts = [_rows_of(part, rows) for part in self.parts]
        self.next = None if self.next is None else self.next[rows]
        self.answers = None if self.answers is None else self.answers.select_rows(rows.to(self.answers.ids.device))

    def fork(self) -> "Inputs":
        """An independent continuation."""
        twin = copy.copy(self)
        twin.parts = list(self.parts)
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor held of what was fed."""
        return [x for part in self.parts for x in part.named().values()]

    def packed(self) -> dict[str, Tensor]:
        """What is on file, by name."""
        numbers = {} if self.next is None else {"next": self.next, "first": torch.tensor(self.first)}
        return numbers | {f"{i}.{name}": x for i, part in enumerate(self.parts) for name, x in part.named().items()}

    def unpack(self, held: Mapping[str, Tensor]) -> None:
        """Take what `packed` gave."""
        self.next, self.first = held.get("next"), int(held.get("first", 0))
        count = len({name.partition(".")[0] for name in held} - {"next", "first"}) if self.wanted else 0
        for number in range(count):
            start = f"{number}."
            own = {name.removeprefix(start): x for name, x in held.items() if name.startswith(start)}
            deep = [own[name] for name in sorted(own) if name.startswith("deep")] or None
            self.parts.append(Part(own["fed"], own["places"], own.get("visual"), deep))


def _rows_of(part: Part, rows: Int[Tensor, " rows"]) -> Part:
    """The given rows of some columns, with what belongs to their visual tokens."""
    part = replace(part, fed=part.fed[rows], places=part.places[:, rows])
    if part.visual is None or part.deep is None:
        return part
    numbers = (part.visual.flatten().long().cumsum(0) - 1).view(part.visual.shape)
    visual = part.visual[rows]
    chosen = numbers[rows][visual]
    return replace(part, visual=visual, deep=[level[chosen] for level in part.deep])


def states(cache: "EvictingCache") -> Iterator[KVState]:
    """What a decision is made on, layer by layer, once the second pass was made that the policy may need.

    Read only where something has to leave, so that nothing is fed in vain.
    """
    plan, inputs = cache.policy.second_pass(), cache.tokens.inputs
    if plan is not None and (inputs.answers is not None or not isinstance(plan, Foresight)):
        layer = cache.evicting_layers[0]
        known = layer.observed.get(plan.statistic)
        scored, held = 0 if known is None else known.shape[-1], layer.store.longest + layer.store.tail
        assert isinstance(plan, Foresight) or held - scored <= (cache.columns - inputs.first) * bool(inputs.parts)
        if scored < held:
            assert cache.reader is not None
            cache.reader(cache, plan)
    for layer in cache.evicting_layers:
        yield layer.state()
