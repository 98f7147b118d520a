"""Subtitles of videos: read from SubRip or JSON, and put between frames."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retention.data.example import Segment

_TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:[.,]\d+)?)")


@dataclass
class Subtitle:
    """A line, and when it is shown, in seconds."""

    start: float
    end: float
    text: str


def seconds(stamp: Any) -> float:
    """A time as a number, or as hours:minutes:seconds."""
    if isinstance(stamp, int | float):
        return float(stamp)
    found = _TIME.search(str(stamp))
    if found is None:
        raise ValueError(f"expected a time such as 00:01:02.5, got {stamp!r}")
    return 3600 * int(found[1] or 0) + 60 * int(found[2]) + float(found[3].replace(",", "."))


def read_subtitles(file: Path) -> list[Subtitle]:
    """Lines of a .srt file, or of a JSON list of {"start", "end", "line"} or {"timestamp": [start, end], "text"}.

    Raises:
        ValueError: for a file that is not there or is neither.
    """
    if not file.is_file():
        raise ValueError(f"expected subtitles in {file}, found no such file; leave them out or get them")
    if file.suffix == ".json":
        return [_of_json(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    found = []
    for block in re.split(r"\n\s*\n", file.read_text(encoding="utf-8").strip()):
        lines = block.splitlines()
        place = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if place is not None:
            start, end = lines[place].split("-->")
            text = re.sub(r"<[^>]+>", "", " ".join(lines[place + 1 :])).strip()
            found.append(Subtitle(seconds(start), seconds(end), text))
    return found


def _of_json(entry: dict[str, Any]) -> Subtitle:
    if "timestamp" in entry:
        start, end = (seconds(x) if x is not None else seconds(entry["timestamp"][0]) for x in entry["timestamp"])
        return Subtitle(start, end, str(entry["text"]))
    return Subtitle(seconds(entry["start"]), seconds(entry["end"]), str(entry.get("line", entry.get("text"))))


def interleave(frames: list[Segment], duration: float, lines: list[Subtitle], offset: float = 0.0) -> list[Segment]:
    """Frames, evenly spaced over a duration, with each line before the first frame that follows its middle."""
    step = duration / max(1, len(frames) - 1)
    waiting = sorted(((line.start + line.end) / 2 - offset, line.text) for line in lines)
    waiting = [(middle, text) for middle, text in waiting if 0 <= middle <= duration]
    segments: list[Segment] = []
    for number, frame in enumerate(frames):
        said = [text for middle, text in waiting if middle <= number * step]
        waiting = waiting[len(said) :]
        segments += [Segment("text", f"{' '.join(said)}\n")] if said else []
        segments.append(frame)
    rest = " ".join(text for _, text in waiting)
    return [*segments, Segment("text", f"{rest}\n")] if rest else segments
