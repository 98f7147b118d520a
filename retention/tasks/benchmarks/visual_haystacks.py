"""Visual Haystacks (Wu et al., 2024, arXiv:2407.13766): one or several of many photographs hold the anchor. MIT.

`path` is a file of the authors (`visual_haystack_<images>.json`), `folder` where the photographs of COCO 2017 start.
The authors draw the order of the images at run time; here the seed of the evaluation fixes it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment, Turn
from retention.data.hub import hub_file, open_source
from retention.data.source import Rows, SourceConfig
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.schema import check_row


@dataclass
class VisualHaystacks(DatasetTask):
    """All photographs, then a question to be answered with yes or no."""

    name: ClassVar[str] = "visual_haystacks"
    schema: ClassVar[dict[str, str]] = {"conversations": "list", "pos_image": "any", "neg_image": "any"}

    path: str = "tsunghanwu/visual_haystacks"
    subset: str | None = "VHs_qa/VHs_full/single_needle/visual_haystack_10.json"
    """The file, where `path` is a hub id or a folder."""

    @property
    def part(self) -> str:
        """Name of the file without its kind."""
        return (self.path if self.path.endswith(".json") else str(self.subset)).rpartition("/")[2].removesuffix(".json")

    def open(self) -> Rows:
        """A local file, or one of a folder or of the hub."""
        file = self.path if self.path.endswith(".json") else str(hub_file(self.source, str(self.subset)))
        found = open_source(SourceConfig(file))
        assert isinstance(found, Rows)
        return found

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Photographs in an order of their own, then the question."""
        for message in row["conversations"]:
            check_row(f"{self.name}.conversations", message, {"value": "text"})
        paths = [*_listed(row["pos_image"]), *_listed(row["neg_image"])]
        order = rng.permutation(len(paths))
        segments: list[Segment] = [self.picture(paths[i]) for i in order]
        asked, told = (message["value"] for message in row["conversations"][:2])
        question = f"{asked.replace('<image>', '').strip()}\nAnswer with yes or no."
        turn = Turn(question, told.strip().lower(), scorer="yes_no", max_new_tokens=16)
        depth = [round(int(np.argmax(order == i)) / max(1, len(paths) - 1), 3) for i in range(len(_listed(row["pos_image"])))]  # fmt: skip
        return Example("", segments, [turn], "after", {"depth": depth, "groups": {"images": len(paths)}})


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
