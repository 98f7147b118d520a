"""The gate artefact: exact round trips, frozen names, damage refused, never half written."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from retention.gates import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.gates.trim import Trim
from tests.tiny import tiny_qwen3

KINDS = {
    "trim": Trim(),
    "linear": Trim(gate_hidden=0),
    "rows": DBTrim(),
    "scalar": DBTrim(scoring="scalar"),
}
PER_LAYER = {
    "trim": ["0.bias", "0.weight", "2.offset", "2.weight"],
    "linear": ["0.offset", "0.weight"],
    "rows": ["0.bias", "0.weight", "2.bias", "2.weight"],
    "scalar": ["0.bias", "0.weight", "2.bias", "2.weight"],
}
SHARED = {"trim": [], "linear": [], "rows": ["offset", "weight"], "scalar": ["offset", "weight"]}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def model():
    model = tiny_qwen3()
    model.config.name_or_path = "tiny-base"
    return model


def make(model, kind="rows", seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RetentionGates.for_model(KINDS[kind], model).requires_grad_(False)


@pytest.fixture
def artefact(model, tmp_path):
    make(model).save_pretrained(tmp_path / "gates")
    return tmp_path / "gates"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(artefact, change):
    path = artefact / "gate_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@every_kind
def test_round_trip_is_exact_to_the_bit(model, kind, tmp_path):
    gates = make(model, kind)
    gates.training_record = {"steps": 3, "seed": 0}
    gates.save_pretrained(tmp_path / "gates")
    again = RetentionGates.from_pretrained(tmp_path / "gates")
    assert (again.config, again.shape, again.base) == (gates.config, gates.shape, gates.base)
    assert again.training_record == gates.training_record
    assert again.tensors().keys() == gates.tensors().keys()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in gates.tensors().items())
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(again(i, x), gates(i, x)) for i in range(3))
    again.check(model)


def test_loading_from_a_relative_path_and_a_string_works(artefact, monkeypatch):
    monkeypatch.chdir(artefact.parent)
    monkeypatch.setenv("HOME", str(artefact.parent))
    for name in ("gates", "./gates", "~/gates", str(artefact), artefact):
        assert RetentionGates.from_pretrained(name).config == DBTrim()


def test_saving_what_was_loaded_writes_the_same_bytes(artefact, tmp_path):
    RetentionGates.from_pretrained(artefact).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(artefact)


@every_kind
def test_tensor_names_are_frozen(model, kind, tmp_path):
    """Renaming one breaks every released artefact."""
    make(model, kind).save_pretrained(tmp_path / "gates")
    expected = [f"layers.{i}.{name}" for i in range(3) for name in PER_LAYER[kind]]
    expected += [f"shared.{name}" for name in SHARED[kind]]
    assert sorted(load_file(tmp_path / "gates" / "gate_model.safetensors")) == sorted(expected)


def test_config_keys_are_frozen(artefact):
    config = json.loads((artefact / "gate_config.json").read_text())
    keys = {
        "format_version",
        "base",
        "shape",
        "gate",
        "memory",
        "training",
        "conventions",
        "storage",
        "versions",
        "tensors_sha256",
    }
    assert set(config) == keys
    assert config["format_version"] == 2
    assert config["gate"] == {
        "name": "dbtrim", "gate_hidden": None, "init_half_life": 10_000.0, "scoring": "rows",
    }  # fmt: skip
    assert config["base"].keys() == {"name_or_path", "revision", "commit", "config_hash", "weight_hash"}
    assert config["conventions"].keys() == {"log_beta", "eviction_age", "age_offset", "score_time"}


def test_the_artefact_is_a_config_tensors_and_a_card(artefact):
    assert sorted(contents(artefact)) == ["README.md", "gate_config.json", "gate_model.safetensors"]
    with safe_open(artefact / "gate_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_card_says_what_the_config_holds(artefact):
    card = (artefact / "README.md").read_text()
    config = json.loads((artefact / "gate_config.json").read_text())
    assert card.startswith("---\nlibrary_name: retention\n")
    for told in ("dbtrim", "tiny-base", config["base"]["config_hash"], config["base"]["weight_hash"], "untrained"):
        assert told in card


def test_the_card_tells_the_training(model, tmp_path):
    gates = make(model)
    gates.training_record = {"task": "needles", "steps": 700, "budget": "1%-8%", "seed": 3}
    gates.save_pretrained(tmp_path / "gates")
    assert "task needles; steps 700; budget 1%-8%; seed 3" in (tmp_path / "gates" / "README.md").read_text()


def test_the_artefact_is_readable_by_others(artefact):
    assert stat.S_IMODE(os.stat(artefact).st_mode) & 0o055 == 0o055
    assert all(stat.S_IMODE(os.stat(file).st_mode) & 0o044 == 0o044 for file in artefact.iterdir())


def test_the_base_is_never_in_the_artefact(model, artefact):
    stored = load_file(artefact / "gate_model.safetensors")
    assert all(name.startswith(("layers.", "shared.")) for name in stored)
    base = {p.shape for p in model.parameters()}
    assert not base & {t.shape for t in stored.values()}
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in make(model).parameters())


def test_the_base_is_not_in_the_artefact_after_gates_were_attached(model, artefact, tmp_path):
    from retention.attach.soft import attach_gates

    gates = make(model)
    with attach_gates(model, gates):
        model(torch.arange(6)[None], use_cache=False)
        gates.save_pretrained(tmp_path / "attached")
    assert contents(tmp_path / "attached") == contents(artefact)


def refuses(artefact, sentence):
    with pytest.raises(ValueError, match=sentence):
        RetentionGates.from_pretrained(artefact)


@pytest.mark.parametrize("name", ["gate_config.json", "gate_model.safetensors"])
def test_a_missing_file_is_refused_by_name(artefact, name):
    (artefact / name).unlink()
    refuses(artefact, f"with {name} in .*found none")


def test_a_missing_folder_is_refused(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere, found none; train one or check the path")


@pytest.mark.parametrize("left", [0, 7, 200, -5])
def test_truncated_tensors_are_refused(artefact, left):
    path = artefact / "gate_model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refuses(artefact, "is damaged .*export it again")


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 1,', "\x00\x01"])
def test_broken_json_is_refused(artefact, text):
    (artefact / "gate_config.json").write_text(text)
    refuses(artefact, "is damaged .*export it again")


def test_a_config_that_is_no_text_is_refused(artefact):
    (artefact / "gate_config.json").write_bytes(b"\xff\xfe\x80")
    refuses(artefact, "is damaged .*export it again")


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_json_that_is_no_config_is_refused(artefact, text):
    (artefact / "gate_config.json").write_text(text)
    refuses(artefact, "is damaged|expected a gate artefact")


@pytest.mark.parametrize("key", ["shape", "gate", "base", "training"])
def test_a_config_without_one_of_its_parts_is_refused(artefact, key):
    edit(artefact, lambda config: config.pop(key))
    refuses(artefact, key)


@pytest.mark.parametrize("version", [3, 99, 0, True, None, "1", 10**50])
def test_another_format_is_refused_with_its_number(artefact, version):
    edit(artefact, lambda config: config.update(format_version=version))
    refuses(artefact, f"format 2 or older .*got .*{str(version)[:20]}.*; update retention")


def test_tensors_of_another_shape_are_refused_naming_both(artefact):
    edit(artefact, lambda config: config["shape"].update(hidden_size=96))
    refuses(artefact, r"do not fit its config: layers.0.0.weight .*\[28, 64\].*\[42, 96\]")


def test_missing_tensors_are_refused(artefact):
    edit(artefact, lambda config: config["shape"].update(layers=[0, 1, 2, 3]))
    refuses(artefact, "do not fit its config")


def test_an_unknown_architecture_is_refused(artefact):
    edit(artefact, lambda config: config["gate"].update(name="lstm"))
    refuses(artefact, "got 'lstm'.*newer retention")


def test_a_model_of_another_shape_is_refused_naming_both_numbers(artefact):
    with pytest.raises(ValueError, match="hidden features 64, the model has 32"):
        RetentionGates.from_pretrained(artefact).check(tiny_qwen3(hidden_size=32))


def test_another_base_is_refused_naming_both(artefact):
    other = tiny_qwen3(seed=5)
    other.config.name_or_path = "other-base"
    with pytest.raises(ValueError, match=r"'tiny-base' .*'other-base'"):
        RetentionGates.from_pretrained(artefact).check(other)


def test_writing_over_an_artefact_replaces_all_of_it_and_nothing_else(model, artefact, tmp_path):
    (artefact / "notes.txt").write_text("mine")
    make(model, "scalar", seed=7).save_pretrained(artefact)
    make(model, "scalar", seed=7).save_pretrained(tmp_path / "fresh")
    found = contents(artefact)
    assert found.pop("notes.txt") == b"mine"
    assert found == contents(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "gates"]


def test_parents_are_made(model, tmp_path):
    make(model).save_pretrained(tmp_path / "a" / "b" / "gates")
    assert RetentionGates.from_pretrained(tmp_path / "a" / "b" / "gates").config == DBTrim()


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("broken", ["save", "os.fsync", "json.dumps"])
def test_a_write_that_dies_leaves_what_was_there_and_no_remains(model, tmp_path, monkeypatch, existing, broken):
    folder = tmp_path / "gates"
    if existing:
        make(model).save_pretrained(folder)
    before = contents(folder) if existing else None

    def die(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"retention.checkpoint.writing.{broken}", die)
        with pytest.raises(OSError, match="no space left"):
            make(model, "trim", seed=3).save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == (["gates"] if existing else [])
    assert (contents(folder) if existing else None) == before


def test_files_half_written_when_the_process_is_cut_off_never_appear_under_the_name(model, artefact, monkeypatch):
    before, synced = contents(artefact), []

    def cut(number):
        synced.append(number)
        if len(synced) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("retention.checkpoint.writing.os.fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        make(model, seed=3).save_pretrained(artefact)
    assert contents(artefact) == before
    assert [path.name for path in artefact.parent.iterdir()] == ["gates"]


@pytest.mark.parametrize("last", range(4))
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_swap_that_is_cut_off_puts_the_old_artefact_back(model, artefact, monkeypatch, last, error):
    """After each of its renames; the new one has a picture, the old one has none."""
    before, replace, renamed = contents(artefact), os.replace, []

    def cut(source, target):
        if len(renamed) == last:
            monkeypatch.setattr("retention.checkpoint.writing.os.replace", replace)
            raise error
        renamed.append(target)
        replace(source, target)

    gates = make(model, seed=3)
    gates.training_record = {"validation": {"global 5%": 0.5}}
    monkeypatch.setattr("retention.checkpoint.writing.os.replace", cut)
    with pytest.raises(error):
        gates.save_pretrained(artefact)
    assert contents(artefact) == before
    assert [path.name for path in artefact.parent.iterdir()] == ["gates"]


def test_files_that_replace_others_come_from_the_same_disk(model, artefact, tmp_path, monkeypatch):
    """Through a link, as to a mounted folder: a rename works within one file system only."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "gates").symlink_to(artefact)
    replace, sources = os.replace, []
    monkeypatch.setattr("retention.checkpoint.writing.os.replace", lambda a, b: [sources.append(a), replace(a, b)])
    make(model, seed=3).save_pretrained(tmp_path / "elsewhere" / "gates")
    assert [source.name for source in sources] == ["gate_model.safetensors", "README.md", "gate_config.json"]
    assert {source.parent.parent.resolve() for source in sources} == {artefact.resolve()}


def test_what_cannot_be_replaced_leaves_the_artefact_as_it_was(model, artefact):
    (artefact / "README.md").unlink()
    (artefact / "README.md").mkdir()
    tensors = (artefact / "gate_model.safetensors").read_bytes()
    with pytest.raises(IsADirectoryError):
        make(model, seed=3).save_pretrained(artefact)
    assert (artefact / "gate_model.safetensors").read_bytes() == tensors
    assert RetentionGates.from_pretrained(artefact).config == DBTrim()


def test_a_file_where_the_folder_should_be_is_named(model, tmp_path):
    (tmp_path / "gates").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a folder for the gate artefact, got the file .*gates"):
        make(model).save_pretrained(tmp_path / "gates")
    assert (tmp_path / "gates").read_text() == "mine"


UNREADABLE = {
    "deep": ({"data": json.loads("[" * 40 + "]" * 40)}, "nested too deeply"),
    "half a character": ({"task": "\ud800"}, "half of a character"),
    "large": ({"task": "x" * 2**22}, "config of at most 4194304 bytes"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_record_that_could_not_be_read_again_is_not_written(model, artefact, case):
    record, reason = UNREADABLE[case]
    before, gates = contents(artefact), make(model, seed=3)
    gates.training_record = record
    with pytest.raises(ValueError, match=reason):
        gates.save_pretrained(artefact)
    assert contents(artefact) == before


def test_files_of_two_writes_are_refused(model, artefact, tmp_path):
    make(model, seed=1).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / "gate_model.safetensors", artefact / "gate_model.safetensors")
    with pytest.raises(ValueError, match="files of two writes are mixed"):
        RetentionGates.from_pretrained(artefact)
