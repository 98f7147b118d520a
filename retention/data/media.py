"""Images and videos of a row: where they lie, and how they are opened."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class BadRow(Exception):  # noqa: N818  # it tells of data, and nobody but the loader sees it
    """A row that cannot be trained on: a reason of few words, counted, and what exactly was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> Any:
        return BadRow, (self.reason, self.detail)


def located(payload: Any, folder: Path | None) -> Any:
    """An image or video as it can be opened later: an existing path, or what holds the pixels itself.

    Args:
        payload: a path, a `data:` URL, a PIL image, an array, {"bytes", "path"}, or a list of these (frames).
        folder: where relative paths start.

    Raises:
        BadRow: for a file that is not there, an address on the web, or nothing at all.
    """
    if isinstance(payload, dict):
        if payload.get("bytes") is not None:
            return payload["bytes"]
        payload = payload.get("path") or payload.get("url")
    if isinstance(payload, list | tuple):
        if not payload:
            raise BadRow("missing image", "no frames")
        return [located(frame, folder) for frame in payload]
    if payload is None or (isinstance(payload, str) and not payload):
        raise BadRow("missing image", "nothing is given")
    if not isinstance(payload, str | Path):
        return payload
    text = str(payload)
    if text.startswith("data:"):
        try:
            return base64.b64decode(text.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadRow("unreadable image", str(error)) from error
    if text.startswith(("http://", "https://")):
        raise BadRow("missing image", f"{text} lies on the web and is not fetched")
    path = Path(text.removeprefix("file://"))
    if folder is not None and not path.is_absolute():
        path = folder / path
    if not path.exists():
        raise BadRow("missing image", str(path))
    return path


def opened(payload: Any) -> Image.Image:
    """A located image, decoded, in RGB.

    Raises:
        BadRow: where it cannot be decoded.
    """
    try:
        if isinstance(payload, Image.Image):
            return payload.convert("RGB")
        if isinstance(payload, np.ndarray):
            return Image.fromarray(payload).convert("RGB")
        return Image.open(BytesIO(payload) if isinstance(payload, bytes) else payload).convert("RGB")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRow("unreadable image", str(error)) from error


@dataclass(frozen=True)
class Film:
    """Frames of a video, and where they were taken from it."""

    frames: list[Image.Image]
    places: list[int]
    """Number of each frame in the whole video."""
    total: int
    """Frames of the whole video."""
    rate: float | None
    """Frames per second of the whole video, where it is told."""


def film(payload: Any, count: int) -> Film:
    """At most `count` frames of a located video, evenly spaced.

    Args:
        payload: frames as a list or one array [frames, height, width, 3], a folder of images, or a file.
        count: most frames.

    Raises:
        BadRow: where it cannot be decoded.
        ValueError: where decoding needs a package that is not there.
    """
    if isinstance(payload, Path) and payload.is_dir():
        payload = sorted(file for file in payload.iterdir() if file.suffix.lower() in PICTURES)
        if not payload:
            raise BadRow("unreadable video", "a folder without images")
    if isinstance(payload, list | np.ndarray):
        return _chosen([opened(payload[i]) for i in _spaced(len(payload), count)], len(payload), None)
    if isinstance(payload, bytes) or payload.suffix.lower() in PICTURES:
        try:
            with Image.open(BytesIO(payload) if isinstance(payload, bytes) else payload) as file:
                every = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
                shown = file.info.get("duration")
        except (OSError, ValueError, SyntaxError) as error:
            raise BadRow("unreadable video", str(error)) from error
        kept = [every[i] for i in _spaced(len(every), count)]
        return _chosen(kept, len(every), 1000 / shown if shown else None)
    return _decoded(payload, count)


def _decoded(path: Path, count: int) -> Film:
    """Frames of a film file, by PyAV."""
    try:
        av = import_module("av")
    except ImportError as error:
        raise ValueError(f"reading the video {path} needs the package av; pip install 'retention[video]'") from error
    try:
        with av.open(str(path)) as file:
            rate = file.streams.video[0].average_rate
            total = file.streams.video[0].frames or sum(1 for _ in file.decode(video=0))
        wanted = set(_spaced(total, count))
        with av.open(str(path)) as file:  # only what is taken is made into pixels
            shown = (frame for number, frame in enumerate(file.decode(video=0)) if number in wanted)
            kept = [frame.to_image() for frame in shown]
    except (OSError, ValueError, IndexError) as error:
        raise BadRow("unreadable video", str(error)) from error
    if len(kept) < len(wanted):
        raise BadRow("unreadable video", f"it ends after {len(kept)} of {len(wanted)} frames that were to be taken")
    return _chosen(kept, total, float(rate) if rate else None)


def _chosen(frames: Sequence[Image.Image], total: int, rate: float | None) -> Film:
    return Film(list(frames), _spaced(total, len(frames)), total, rate)


def _spaced(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
