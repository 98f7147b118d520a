"""Reports without a model: one run's written anew, several runs in one table, and what cannot stand in one."""

import json

import pytest

from retention.config import compose
from retention.entry import folders_joined
from retention.evaluation.compare import rebuild
from retention.evaluation.run import run

SMALL = [
    "task.ask_subset.n_images=2",
    "task.ask_subset.n_needles=8",
    "task.ask_subset.n_asked=4",
    "task.ask_subset.n_turns=2",
]
SAME = ["gates=null", "budgets=[20%]", "batch_size=2", *SMALL]


def evaluated(folder, *words):
    run(compose("eval", [*SAME, f"output_dir={folder}", *words]))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("runs") / "one", "policies=[keydiff]", "examples=3")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    words = ("policies=[keydiff,snapkv]", "policy.snapkv.window_size=4", "examples=3")
    return evaluated(tmp_path_factory.mktemp("runs") / "two", *words)


def test_a_report_is_written_anew_from_what_lies_there(one):
    names = ("summary.json", "table.md", "report.html", "claims.csv", "patches.csv", "places.csv", "curves.svg")
    before = {name: (one / name).read_bytes() for name in names}
    for name in names:
        (one / name).unlink()
    result = rebuild([one], one)
    assert {name: (one / name).read_bytes() for name in names} == before
    assert [row["policy"] for row in result.summary] == ["full", "keydiff", "random"]


@pytest.mark.usefixtures("unrendered")
def test_runs_of_the_same_settings_are_pooled(one, two, tmp_path):
    result = run(compose("eval", [f"report=['{one}','{two}']", f"output_dir={tmp_path / 'both'}"]))
    assert [row["policy"] for row in result.summary] == ["full", "keydiff", "random", "snapkv"]
    assert {row["n"] for row in result.summary} == {6}
    page = (tmp_path / "both" / "report.html").read_text()
    assert "<code>config.policy.snapkv.window_size</code>" in page
    assert '<th scope="col">one</th><th scope="col">two</th>' in page
    with pytest.raises(ValueError, match="compares runs itself"):
        rebuild([tmp_path / "both"], tmp_path)


@pytest.mark.usefixtures("unrendered")
def test_policies_of_other_settings_keep_their_runs_names(two, tmp_path):
    changed = ("policy.snapkv.window_size=2", "policy.random.seed=5")
    other = evaluated(tmp_path / "three", "policies=[keydiff,snapkv]", *changed, "examples=3")
    result = rebuild([two, other], tmp_path / "both")
    assert [row["policy"] for row in result.summary] == [
        *("full", "keydiff", "random (three)", "random (two)", "snapkv (three)", "snapkv (two)")
    ]
    assert "random+protect was not run" not in result.table
    assert all(row["bytes_ratio"] for row in result.summary if row["policy"] != "full")
    baselines = {claim["reference"] for claim in json.loads((tmp_path / "both" / "summary.json").read_text())["claims"]}
    assert baselines <= {"full", "keydiff", "snapkv (three)", "snapkv (two)"}


def test_what_cannot_stand_in_one_table_is_refused_in_a_sentence(one, tmp_path):
    manifest = json.loads((one / "manifest.json").read_text())
    for place, value, told in (
        (("config", "task", "ask_subset", "n_images"), 5, r"task.ask_subset.n_images is 2 in one and 5"),
        (("config", "cache", "sink_size"), 4, r"cache.sink_size is 0 in one and 4"),
        (("config", "split"), "val", r"split is 'test' in one and 'val'"),
        (("config", "model", "dtype"), "bfloat16", r"model.dtype is 'float32' in one and 'bfloat16'"),
        (("base", "name"), "larger", r"the base model is 'embedded' in one and 'larger'"),
    ):
        changed = json.loads(json.dumps(manifest))
        inner = changed
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        folder = tmp_path / place[-1]
        folder.mkdir()
        (folder / "examples.jsonl").write_bytes((one / "examples.jsonl").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"one and {place[-1]} cannot stand in one table: {told}"):
            rebuild([one, folder], tmp_path / "out")
    with pytest.raises(ValueError, match=r"name one that eval\.py wrote"):
        rebuild([tmp_path], tmp_path)
    with pytest.raises(ValueError, match="name each once"):
        rebuild([one, one], tmp_path)


def test_folders_behind_report_become_one_list():
    assert folders_joined(["report=a", "b c", "output_dir=x", "d,e"]) == ["report=['a','b c','d,e']", "output_dir=x"]
    assert folders_joined(["report=[a,b]", "x"]) == ["report=[a,b]", "x"]
    assert folders_joined(["-m", "gates=a"]) == ["-m", "gates=a"]
