"""The only door to `datasets`: hub ids, Parquet, CSV and image folders, whole or streaming."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from retention.data.media import PICTURES, BadRow
from retention.data.source import JsonFile, JsonLines, Rows, SourceConfig, Stream

_FILES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_TRIES = 3
log = logging.getLogger(__name__)


def open_source(config: SourceConfig) -> Rows | Stream:
    """The rows of a source; images stay encoded until a batch is made of them.

    Raises:
        ValueError: for a source that is not there, empty, gated, in need of a loading script, or of a missing package.
    """
    path = Path(config.path)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        if not path.is_file():
            raise ValueError(f"expected a data set in {config.path}, found no such file; check data.sources[].path")
        found: Rows = JsonFile(path) if path.suffix == ".json" else JsonLines(path)
    elif config.streaming:
        return HubStream(config, _loaded(config))
    else:
        found = HubRows(_loaded(config))
    if len(found) == 0:
        raise ValueError(f"expected rows in the data set {config.path}, split {config.split}, got none")
    return found


def hub_file(config: SourceConfig, name: str) -> Path:
    """A file of a data set as it lies on the hub, downloaded once; a local folder's own file where `path` is one.

    Raises:
        ValueError: for a file or data set that is not there, or gated.
    """
    folder = Path(config.path)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ValueError(f"expected the file {name} in {folder}, found none; check the data set's path")
        return folder / name

    def load() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(config.path, name, repo_type="dataset", revision=config.revision)

    return Path(_told(config, load))


def folder_of(config: SourceConfig) -> Path | None:
    """Where relative paths of a source's images start; None where they are inside the data set."""
    if config.folder is not None:
        return Path(config.folder)
    path = Path(config.path)
    if path.is_dir():
        return path
    return path.parent if path.is_file() else None


class HubRows:
    """A data set on this disk, its rows by number as plain values: nothing is decoded on reading."""

    def __init__(self, opened: Any) -> None:
        self.table = opened.with_format("arrow")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """One row."""
        return self.table[int(number)].to_pylist()[0]


class HubStream:
    """A data set that is read while it is downloaded; a broken connection is tried again where it broke."""

    def __init__(self, config: SourceConfig, opened: Any) -> None:
        self.config, self.opened = config, opened

    def after(self, number: int) -> Iterator[Mapping[str, Any] | BadRow]:
        """Rows from a number onwards, again from the first once all are read.

        Raises:
            ValueError: for an empty stream, or one that breaks again and again at the same row.
        """
        place, failed = number, 0
        length: int | None = None
        while True:
            start, read = (place if length is None else place % length), 0
            try:
                for table in self.opened.skip(start).with_format("arrow"):
                    yield _fetched(table.to_pylist()[0])
                    place, read, failed = place + 1, read + 1, 0
            except (OSError, RuntimeError) as error:
                failed += 1
                if failed == _TRIES:
                    raise ValueError(f"cannot read on in {self.config.path} at row {place}: {_line(error)}") from error
                log.warning("%s broke at row %d (%s), reading on", self.config.path, place, _line(error))
                continue
            if length is None:  # without a row it ended before the place asked for
                length = start + read if read else sum(1 for _ in self.opened.with_format("arrow"))
            if length == 0:
                raise ValueError(f"expected rows in the data set {self.config.path}, got none")


def _loaded(config: SourceConfig) -> Any:
    """The data set as `datasets` opens it."""
    try:
        import datasets  # type: ignore  # it has no types, and need not be there
    except ImportError as error:
        raise ValueError(
            f"reading {config.path} needs the package datasets; install it with pip install 'retention[data]'"
        ) from error
    return _opening(config, lambda *given, **more: datasets.load_dataset(*given, streaming=config.streaming, **more))


def _opening(config: SourceConfig, load: Callable[..., Any]) -> Any:
    """Call the loader as the kind of source asks for, its errors as one sentence."""
    path = Path(config.path)

    def fitting() -> Any:
        if path.suffix in _FILES:
            if not path.is_file():
                raise FileNotFoundError("found no such file; check data.sources[].path")
            more = {"sep": "\t"} if path.suffix == ".tsv" else {}
            return load(_FILES[path.suffix], data_files=str(path), split=config.split, **more)
        if path.is_dir() and _of_images(path):
            return load("imagefolder", data_dir=str(path), split=config.split)
        return load(config.path, config.name, split=config.split, revision=config.revision)

    return _told(config, fitting)


def _told(config: SourceConfig, load: Callable[[], Any]) -> Any:
    """What a loader brings, its errors as one sentence."""
    try:
        return load()
    except Exception as error:  # the loaders of formats raise errors of their own
        told = f"{_line(error)} {error.__cause__ or ''}".lower()
        mend = ""
        if "gated" in told or "authenticated" in told:
            mend = "; ask for access on its page and log in with hf auth login"
        elif "script" in told:
            mend = (
                "; expected one in Parquet or JSON, not with a loading script: look for its branch refs/convert/parquet"
            )
        elif isinstance(error, ConnectionError):
            mend = "; check its name and the network"
        raise ValueError(f"cannot open the data set {config.path!r}: {_line(error)}{mend}") from error


def _of_images(folder: Path) -> bool:
    if any((folder / f"metadata.{kind}").exists() for kind in ("jsonl", "csv", "parquet")):
        return True
    return next((True for file in folder.rglob("*") if file.suffix.lower() in PICTURES), False)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _fetched(value: Any) -> Any:
    """A streamed row with the files that it only names."""
    if isinstance(value, list):
        return [_fetched(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"bytes", "path"} and value["bytes"] is None and "://" in str(value["path"]):
        from datasets.utils.file_utils import xopen  # type: ignore  # as above

        with xopen(value["path"], "rb") as file:
            return {**value, "bytes": file.read()}
    return {name: _fetched(inner) for name, inner in value.items()}
