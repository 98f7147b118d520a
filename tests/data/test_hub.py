"""Sources of every kind, whole and streaming, and what is said of those that cannot be opened."""

import json
import sys
from itertools import islice

import pytest
from PIL import Image

from retention.data.chat import read_chat
from retention.data.hub import folder_of, open_source
from retention.data.media import BadRow, opened
from retention.data.source import SourceConfig
from tests.zoo import picture

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def image(seed):
    return Image.fromarray(picture(8, 8, seed=seed))


def pixels(row, config):
    return [opened(part["image"]).tobytes() for part in read_chat(row, "x", folder=folder_of(config)).media]


def parquet(tmp_path, rows=5):
    features = {"images": datasets.Sequence(datasets.Image()), "question": datasets.Value("string")}
    features["answer"] = datasets.Value("string")
    values = {"images": [[image(i)] for i in range(rows)], "question": [f"What {i}?" for i in range(rows)]}
    values["answer"] = ["no"] * rows
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).to_parquet(str(tmp_path / "x.parquet"))
    return tmp_path / "x.parquet"


def images(tmp_path, rows=5):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(rows):
        image(i).save(folder / f"{i}.png")
    told = [{"file_name": f"{i}.png", "text": f"Picture {i}."} for i in range(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, told)))
    return folder


@pytest.mark.parametrize("make", [parquet, images])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_hub_formats_are_those_that_went_in(make, streaming, tmp_path):
    config = SourceConfig(str(make(tmp_path)), streaming=streaming)
    source = open_source(config)
    rows = list(islice(source.after(0), 5)) if streaming else [source[i] for i in range(len(source))]
    assert sorted(pixels(row, config)[0] for row in rows) == sorted(image(i).tobytes() for i in range(5))
    assert all(read_chat(row, "x").messages[-1]["role"] == "assistant" for row in rows)


def test_streams_begin_anywhere_and_go_on_again(tmp_path):
    source = open_source(SourceConfig(str(parquet(tmp_path)), streaming=True))
    asked = [f"What {i % 5}?" for i in range(17)]
    for start in (0, 3, 5, 11):
        assert [row["question"] for row in islice(source.after(start), 6)] == asked[start : start + 6]


def test_a_broken_stream_is_read_on_where_it_broke(tmp_path, caplog):
    source = open_source(SourceConfig(str(parquet(tmp_path)), streaming=True))
    whole = source.opened

    class Breaking:
        broken = 0

        def skip(self, start):
            self.start = start
            return self

        def with_format(self, kind):
            for i, table in enumerate(whole.skip(self.start).with_format(kind)):
                if (i == 2 and self.broken < 1) or self.broken < 0:
                    self.broken += 1
                    raise ConnectionError("reset by peer")
                yield table

    source.opened = Breaking()
    assert [row["question"] for row in islice(source.after(0), 5)] == [f"What {i}?" for i in range(5)]
    assert "broke at row 2" in caplog.text
    source.opened.broken = -9
    with pytest.raises(ValueError, match=r"cannot read on in .* at row 3: reset by peer"):
        next(source.after(3))


def test_json_lines_are_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "zw\u00f6lf"}\nnonsense\n[1]\n{"messages": "x"}', encoding="utf-8")
    source = open_source(SourceConfig(str(file)))
    assert len(source) == 5
    assert [source[i] for i in (1, 0, 4)] == [{"text": "zw\u00f6lf"}, {"text": "one"}, {"messages": "x"}]
    for number, words in ((2, "not JSON"), (3, "a list where an object belongs")):
        with pytest.raises(BadRow, match=words):
            source[number]
    (tmp_path / "llava.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    source = open_source(SourceConfig(str(tmp_path / "llava.json")))
    assert (len(source), source[1]) == (2, {"text": "two"})
    with pytest.raises(
        ValueError, match=r"needs the package datasets; install it with pip install 'retention\[data\]'"
    ):
        open_source(SourceConfig("someone/something"))


def test_tables(tmp_path):
    (tmp_path / "x.csv").write_text("question,answer\nWhat?,no\nWho?,me\n")
    source = open_source(SourceConfig(str(tmp_path / "x.csv")))
    assert [source[i]["answer"] for i in range(2)] == ["no", "me"]


def test_slices_of_splits(tmp_path):
    assert len(open_source(SourceConfig(str(parquet(tmp_path)), split="train[:2]"))) == 2


def raising(error):
    def load(*args, **kwargs):
        raise error

    return load


MISSING = [
    (
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
        "doesn't",
    ),
    (
        datasets.exceptions.DatasetNotFoundError(
            "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated."
        ),
        "ask for access on its page and log in with hf auth login",
    ),
    (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "loading script"),
    (ConnectionError("Couldn't reach 'a/b' on the Hub"), "check its name and the network"),
    (ValueError("Unknown split 'best'.\nShould be one of ['train']."), "Unknown split"),
]


@pytest.mark.parametrize(("error", "words"), MISSING)
def test_what_cannot_be_opened_is_one_sentence(error, words, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    with pytest.raises(ValueError, match=words) as caught:
        open_source(SourceConfig("a/b"))
    assert str(caught.value).startswith("cannot open the data set 'a/b': ")
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files_are_named(tmp_path):
    for name in ("x.jsonl", "x.json", "x.parquet"):
        with pytest.raises(ValueError, match=f"{name}.*found no such file"):
            open_source(SourceConfig(str(tmp_path / name)))
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="expected rows in the data set"):
        open_source(SourceConfig(str(tmp_path / "x.jsonl")))
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"expected a list of JSON objects in .*, got dict"):
        open_source(SourceConfig(str(tmp_path / "x.json")))
    with pytest.raises(ValueError, match="path to be a file, a folder or a hub id"):
        SourceConfig()
    with pytest.raises(ValueError, match="weight above 0, got 0"):
        SourceConfig("x", weight=0)
