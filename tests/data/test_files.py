"""Files of data sets that are no tables: JSON with a head, and single files of a hub id or a folder."""

import json

import pytest

from retention.data.hub import hub_file
from retention.data.source import JsonFile, SourceConfig


def test_json_may_hold_its_rows_under_data_with_a_head_beside(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"meta_data": {"kind": "open"}, "data": [{"a": 1}, {"a": 2}]}))
    found = JsonFile(file)
    assert ([found[i] for i in range(len(found))], found.head) == (
        [{"a": 1}, {"a": 2}],
        {"meta_data": {"kind": "open"}},
    )
    file.write_text(json.dumps([{"a": 1}]))
    assert (len(JsonFile(file)), JsonFile(file).head) == (1, {})
    file.write_text(json.dumps({"data": "none"}))
    with pytest.raises(ValueError, match=r"expected a list of JSON objects in .*, got dict"):
        JsonFile(file)


def test_a_file_of_a_folder_or_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text("[]")
    assert hub_file(SourceConfig(str(tmp_path)), "rows.json") == tmp_path / "rows.json"
    with pytest.raises(ValueError, match=r"expected the file other.json in .*, found none"):
        hub_file(SourceConfig(str(tmp_path)), "other.json")
    asked = []

    def download(path, name, *, repo_type, revision):
        asked.append((path, name, repo_type, revision))
        if name == "gated.json":
            raise OSError("Access to dataset a/b is gated: you are not authenticated.\nMore.")
        return str(tmp_path / "rows.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hub_file(SourceConfig("a/b", revision="v1"), "rows.json") == tmp_path / "rows.json"
    assert asked == [("a/b", "rows.json", "dataset", "v1")]
    with pytest.raises(
        ValueError, match=r"cannot open the data set 'a/b': Access .*; ask for access on its page"
    ) as told:
        hub_file(SourceConfig("a/b"), "gated.json")
    assert "\n" not in str(told.value)
