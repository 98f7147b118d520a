"""LongVideoBench (Wu et al., 2024, arXiv:2407.15754): questions on videos with subtitles. Gated; CC BY-NC-SA 4.0.

`folder` holds the authors' `videos` and `subtitles`. Frames are evenly spaced, each subtitle before the frame that follows
it. What cannot be read as a letter is wrong; the authors' reader guesses.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from retention.data.example import Example
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.subtitles import interleave, read_subtitles
from retention.tasks.benchmarks.wording import choice_turn
from retention.types import require

ABSENT = "N/A"


@dataclass
class LongVideoBench(DatasetTask):
    """Frames with subtitles between them, then a question with up to five options; one video is one cluster."""

    name: ClassVar[str] = "longvideobench"
    schema: ClassVar[dict[str, str]] = {
        "video_id": "text",
        "id": "text",
        "video_path": "text",
        "subtitle_path": "text",
        "correct_choice": "integer",
        "question": "text",
        **{f"option{i}": "text" for i in range(5)},
        "duration": "number",
        "duration_group": "integer",
        "question_category": "text",
        "topic_category": "text",
        "starting_timestamp_for_subtitles": "number",
    }

    path: str = "longvideobench/LongVideoBench"
    data_split: str = "validation"
    frames: int = 32
    """Frames per video."""
    subtitles: bool = True
    """Show them between the frames."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require([(self.frames >= 1, "task.longvideobench.frames of at least 1", self.frames)])

    @property
    def part(self) -> str:
        """Number of frames, and whether there are subtitles."""
        return f"{self.frames}-frames{'-subtitles' if self.subtitles else ''}"

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Frames and subtitles, then the question."""
        shown = self.clip(Path("videos") / row["video_path"], self.frames)
        count = len(shown)
        if self.subtitles:
            lines = read_subtitles((self._folder or Path()) / "subtitles" / row["subtitle_path"])
            shown = interleave(shown, row["duration"], lines, row["starting_timestamp_for_subtitles"])
        options = [row[f"option{i}"] for i in range(5)]
        right = sum(x != ABSENT for x in options[: row["correct_choice"]])
        turn = choice_turn(row["question"], [x for x in options if x != ABSENT], right)
        groups = {"duration": row["duration_group"], "category": row["question_category"], "frames": count}
        return Example("", shown, [turn], "after", {"cluster": row["video_id"], "groups": groups})
