"""Video-MME (Fu et al., 2025, arXiv:2405.21075): three questions on each of 900 videos, by length. For research only.

`folder` holds the videos, `<videoID>.mp4` or a folder of frames of that name, and with `subtitles` also
`<videoID>.srt`. Frames are evenly spaced and their number stands in the rows; subtitles follow the frames.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from retention.data.example import Example, Segment
from retention.data.media import BadRow
from retention.tasks.benchmarks.base import DatasetTask, Row
from retention.tasks.benchmarks.subtitles import read_subtitles
from retention.tasks.benchmarks.wording import choice_turn
from retention.tasks.scorers.choice import LETTERS
from retention.types import require

KINDS = (".mp4", ".mkv", ".webm", ".gif", "")


@dataclass
class VideoMME(DatasetTask):
    """Frames of a video, then a question with four options; one video is one cluster."""

    name: ClassVar[str] = "video_mme"
    schema: ClassVar[dict[str, str]] = {
        "video_id": "text",
        "duration": "text",
        "domain": "text",
        "sub_category": "text",
        "url": "text",
        "videoID": "text",
        "question_id": "text",
        "task_type": "text",
        "question": "text",
        "options": "texts",
        "answer": "text",
    }

    path: str = "lmms-lab/Video-MME"
    frames: int = 32
    """Frames per video."""
    subtitles: str | None = None
    """Folder of subtitles, <videoID>.srt; null shows none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require([(self.frames >= 1, "task.video_mme.frames of at least 1", self.frames)])

    @property
    def part(self) -> str:
        """Number of frames, and whether there are subtitles."""
        return f"{self.frames}-frames{'-subtitles' if self.subtitles else ''}"

    def build(self, row: Row, rng: np.random.Generator) -> Example:
        """Frames and subtitles, then the question."""
        segments = self.clip(self._video(row["videoID"]), self.frames)
        count = len(segments)
        if self.subtitles is not None:
            lines = read_subtitles(Path(self.subtitles) / f"{row['videoID']}.srt")
            segments.append(Segment("text", f"Subtitles: {' '.join(line.text for line in lines)}\n"))
        choices = [option.partition(". ")[2] or option for option in row["options"]]
        turn = choice_turn(row["question"], choices, LETTERS.index(row["answer"]))
        groups = {"duration": row["duration"], "task": row["task_type"], "frames": count}
        return Example("", segments, [turn], "after", {"cluster": row["videoID"], "groups": groups})

    def _video(self, name: str) -> Path:
        """The file or folder of a video."""
        for folder in (self._folder, self._folder and self._folder / "videos", self._folder and self._folder / "data"):
            for kind in KINDS:
                if folder is not None and (folder / f"{name}{kind}").exists():
                    return (folder / f"{name}{kind}").absolute()
        raise BadRow("missing video", f"{name}.mp4 in task.video_mme.folder = {self.folder}")
