"""MM-NIAH (Wang et al., 2024, arXiv:2406.07230): needles of text or image in documents with images. MIT.

`path` is an annotation file (`mm_niah_val/annotations/<task>.jsonl`), `folder` where its images start. Needles of text
are found again in the document and marked as evidence. Options that are images come after the document was evicted, as a
second prompt, for the questions of this package are text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from retention.data.example import EvidenceRef, Example, Segment, TextRef, Turn
from retention.data.hub import hub_file, open_source
from retention.data.source import Rows, SourceConfig
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.schema import check_row
from retention.tasks.benchmarks.sets import SetsTask
from retention.tasks.benchmarks.wording import LETTER, choice_turn, interleaved, letter_of
from retention.tasks.scorers.choice import LETTERS

PLACE = "(<image>)"
TASKS = tuple(f"{task}-{needle}" for task in ("retrieval", "counting", "reasoning") for needle in ("text", "image"))
LENGTHS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64)
"""Upper ends of the bins of context length, in thousands of tokens; as the authors' heat maps have."""


@dataclass
class MMNIAH(SetsTask):
    """A document with images, a question, and options, a list or a word as answer."""

    name: ClassVar[str] = "mm_niah"
    schema: ClassVar[dict[str, str]] = {
        "id": "answer",
        "images_list": "texts",
        "context": "text",
        "question": "text",
        "answer": "any",
        "meta": "record",
    }
    told: ClassVar[dict[str, str]] = {"placed_depth": "any", "context_length": "number", "needles": "list?"}

    path: str = "OpenGVLab/MM-NIAH"
    subset: str | None = "retrieval-text"
    data_split: str = "val"
    max_new_tokens: int = 32
    """Longest answer."""

    def open(self) -> Rows:
        """A local annotation file, or the one on the hub; images have to be unpacked by hand."""
        if Path(self.source.path).is_file():
            return super().open()
        file = hub_file(self.source, f"mm_niah_{self.data_split}/annotations/{self.subset}.jsonl")
        found = open_source(SourceConfig(str(file)))
        assert isinstance(found, Rows)
        return found

    def known(self) -> Sequence[str]:
        """Three tasks on needles of two kinds."""
        return TASKS

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """The document, then the question."""
        meta = row["meta"]
        check_row(f"{self.name}.meta", meta, self.told)
        pictures = iter(row["images_list"])
        segments = interleaved(row["context"], PLACE, lambda _: self.picture(next(pictures)))
        evidence = _found(segments, meta.get("needles") or [])
        turn, later = self._asked(row)
        turn.evidence = list(evidence)
        depth = np.mean(meta["placed_depth"])
        length = next((f"{bound}k" for bound in LENGTHS if meta["context_length"] <= 1000 * bound), "more")
        groups = {"task": self.subset, "length": length, "depth": f"{min(4, int(5 * depth)) * 20}%"}
        groups["length x depth"] = f"{length} x {groups['depth']}"
        return Example("", segments, [turn], "after", {"groups": groups}, later=later)

    def _asked(self, row: Row) -> tuple[Turn, list[Segment]]:
        """The question, and the options that are images."""
        answer, meta, new = row["answer"], row["meta"], self.max_new_tokens
        paths, choices = meta.get("choices_image_path") or [], meta.get("choices") or []
        if isinstance(answer, list):
            items = [str(item) for item in answer]
            text = f"{row['question']}\nAnswer with a list of numbers in brackets."
            return Turn(text, items, scorer="list_soft", max_new_tokens=new, told=f"[{', '.join(items)}]"), []
        if isinstance(answer, int) and paths:
            shown = [part for i, path in enumerate(paths) for part in (_label(i), self.picture(path))]
            names = [f"image {letter}" for letter in LETTERS[: len(paths)]]
            turn = choice_turn(row["question"], names, answer, new=new)
            turn.question = f"{row['question']}\n{LETTER}"
            return turn, shown
        if choices:
            return choice_turn(row["question"], choices, letter_of(answer, choices), new=new), []
        return Turn(f"{row['question']}\nAnswer:", str(answer), scorer="contains_any", max_new_tokens=new), []


def _label(number: int) -> Segment:
    return Segment("text", f"\n{LETTERS[number]}. ")


def _found(segments: list[Segment], needles: list[Any]) -> list[EvidenceRef | TextRef]:
    """Where needles of text stand; nothing unless each is found."""
    places: list[EvidenceRef | TextRef] = []
    for needle in needles:
        hits = [
            (i, part.payload.find(needle))
            for i, part in enumerate(segments)
            if part.kind == "text" and isinstance(needle, str) and needle in part.payload
        ]
        if not hits:
            return []
        places.append(TextRef(hits[0][0], hits[0][1], hits[0][1] + len(needle)))
    return places
