"""MileBench (Song et al., 2024, arXiv:2404.18532): 29 sets with many images among text. Data CC BY-NC 4.0.

`path` is the folder the authors' archives unpack to: `<set>/<set>.json` beside `<set>/images`. Instruction and images in
their places come first; what stands behind the last image is the question. Prompts that are too long lose what stands
between instruction and question, from its start on. Its two scores are plain means over the sets of its realistic part,
temporal and semantic ones together, and over those of its diagnostic part (as the authors' `score.py` divides them).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np

from retention.data.example import Example, Segment, Turn
from retention.data.source import JsonFile
from retention.tasks.benchmarks.base import Row
from retention.tasks.benchmarks.schema import check_row
from retention.tasks.benchmarks.sets import SetsTask
from retention.tasks.benchmarks.wording import choice_turn, interleaved
from retention.tasks.further import Row as Answer
from retention.tasks.further import counted, mean_score
from retention.types import require

PLACE = r"\{((?:image|table)#\d+)\}"
CONTAINED, SPLIT = ("MMCoQA",), ("TextNeedleInAHaystack", "ImageNeedleInAHaystack")

TEMPORAL = [
    "ActionLocalization", "ActionPrediction", "ActionSequence", "CharacterOrder",
    "CounterfactualInference", "EgocentricNavigation", "MovingAttribute", "MovingDirection",
    "ObjectExistence", "ObjectInteraction", "ObjectShuffle", "SceneTransition",
    "StateChange",
]  # fmt: skip
SEMANTIC = [
    "ALFRED", "CLEVR-Change", "DocVQA", "IEdit",
    "MMCoQA", "MultiModalQA", "nuscenes", "OCR-VQA",
    "SlideVQA", "Spot-the-Diff", "TQA", "WebQA",
    "WikiVQA",
]  # fmt: skip
PARTS = {
    "realistic": [*TEMPORAL, *SEMANTIC],
    "temporal": TEMPORAL,
    "semantic": SEMANTIC,
    "diagnostic": [*SPLIT, "GPR1200"],
}
"""Sets that are averaged together."""


@dataclass
class MileBench(SetsTask):
    """One set, named by `subset`."""

    name: ClassVar[str] = "milebench"
    schema: ClassVar[dict[str, str]] = {
        "sample_id": "answer",
        "task_instruction_id": "integer",
        "task_instance": "record",
        "response": "answer",
        "image_quantity_level": "text?",
    }
    instance: ClassVar[dict[str, str]] = {"context": "text", "images_path": "texts", "choice_list": "texts?"}
    cut: ClassVar[str] = "start"
    kept: ClassVar[int] = 1

    path: str = "FreedomIntelligence/MileBench"
    subset: str | None = "TextNeedleInAHaystack"
    max_new_tokens: int = 128
    """Longest answer."""

    def open(self) -> JsonFile:
        """The file of the set in the local folder."""
        file = Path(self.path) / str(self.subset) / f"{self.subset}.json"
        if not file.is_file():
            raise ValueError(
                f"expected the file {file}, found none; unpack the archives of FreedomIntelligence/MileBench and set "
                "task.milebench.path to their folder"
            )
        found = JsonFile(file)
        check_row(f"{self.name}.meta_data", found.head.get("meta_data", {}), {"task_instruction": "texts", "question_type": "text"})  # fmt: skip
        require([(len(found) > 0, f"rows in {file}", 0)])
        return found

    @property
    def _folder(self) -> Path | None:
        return Path(self.folder) if self.folder is not None else Path(self.path) / str(self.subset) / "images"

    def known(self) -> Sequence[str]:
        """The sets that lie in the local folder."""
        return sorted(file.stem for file in Path(self.path).glob("*/*.json") if file.stem == file.parent.name)

    @classmethod
    def further(cls, rows: Sequence[Answer]) -> dict[str, float]:
        """The plain mean over the sets of each part, where all of them were evaluated."""
        own: dict[str, list[Answer]] = defaultdict(list)
        for row in counted(rows):
            own[row["groups"].get("set", "")].append(row)
        scores = {name: mean_score(answers) for name, answers in own.items()}
        whole = {part: names for part, names in PARTS.items() if scores.keys() >= set(names)}
        return super().further(rows) | {part: fmean(scores[name] for name in names) for part, names in whole.items()}

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Instruction, context with its images, then what follows them with the options."""
        instance, head = row["task_instance"], self.rows.head["meta_data"]  # type: ignore[attr-defined]  # see open
        check_row(f"{self.name}.task_instance", instance, self.instance)
        pictures = list(instance["images_path"])
        parts = interleaved(instance["context"], PLACE, lambda place: self.picture(pictures[_number(place)]))
        asked = parts.pop().payload if parts and parts[-1].kind == "text" else ""
        shown = [Segment("text", f"{head['task_instruction'][row['task_instruction_id']].strip()}\n"), *parts]
        level = "few" if len(pictures) < 6 else "medium" if len(pictures) <= 31 else "many"
        turn = self._turn(asked.strip(), instance, row["response"], head["question_type"])
        return Example("", shown, [turn], "after", {"groups": {"set": self.subset, "images": level}})

    def _turn(self, asked: str, instance: Mapping[str, Any], response: Any, kind: str) -> Turn:
        if instance.get("choice_list"):
            return choice_turn(f"\n{asked}", instance["choice_list"], response, new=self.max_new_tokens)
        scorer = "contains_any" if self.subset in CONTAINED else "rouge_l" if "open" in kind.lower() else "exact"
        if self.subset in SPLIT:
            scorer = "token_in_split"
        answer = [str(item) for item in response] if isinstance(response, list) else str(response)
        return Turn(f"\n{asked}\nAnswer:", answer, scorer=scorer, max_new_tokens=self.max_new_tokens)


def _number(place: str) -> int:
    """Places count from 1."""
    return int(place.partition("#")[2]) - 1
