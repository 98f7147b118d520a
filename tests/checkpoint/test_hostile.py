"""Artefacts from strangers: whatever is wrong with them ends in one sentence, before anything large or foreign happens."""

import hashlib
import json
import os
import pickle
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention.gates import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.memory import RetentionMemory
from retention.memory.linear import Linear
from retention.types import ModelShape

CONFIG, TENSORS = "gate_config.json", "gate_model.safetensors"
SHAPE = ModelShape("qwen3", (0, 1), num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=32)
CALIBRATION = {"budgets": [4.0, 8.0], "thresholds": [-0.1, -0.4], "seen": 640.0}


def plain(folder, storage="int8"):
    """A small artefact with everything in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gates = RetentionGates(DBTrim(gate_hidden=32), SHAPE, {"name_or_path": "a/b", "weight_hash": "00"})
        gates.memory = RetentionMemory(Linear(features=2, hidden=2), SHAPE)
    gates.training_record = {"objective": "distillation", "seed": 0, "calibration": CALIBRATION}
    gates.save_pretrained(folder, storage=storage)
    return folder


@pytest.fixture
def artefact(tmp_path):
    return plain(tmp_path / "gates")


def refused(folder, match=None):
    """One line of a plain ValueError, soon and without much memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        RetentionGates.from_pretrained(folder)
    assert type(caught.value) is ValueError
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500 + len(str(folder))
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB


def rewrite(artefact, change):
    """Change the config's values."""
    config = json.loads((artefact / CONFIG).read_text())
    change(config)
    (artefact / CONFIG).write_text(json.dumps(config))


def swap(artefact, content):
    """Other tensors, with their own digest, as somebody who means it would do."""
    (artefact / TENSORS).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(artefact, lambda config: config.update(tensors_sha256=digest))


def header_of(artefact):
    content = (artefact / TENSORS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_under_the_name_of_the_tensors_is_never_run(artefact, tmp_path, protocol):
    swap(artefact, pickle.dumps({"w": Payload(tmp_path / "ran")}, protocol=protocol))
    refused(artefact, "is damaged .*export it again")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_torch_under_the_name_of_the_tensors_is_never_run(artefact, tmp_path):
    torch.save({"w": Payload(tmp_path / "ran")}, tmp_path / "pickle")
    swap(artefact, (tmp_path / "pickle").read_bytes())
    refused(artefact, "is damaged")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "gate_model.bin", "gate_model.pt", "model.pkl", "gate_model.py"])
def test_other_files_beside_are_never_read(artefact, tmp_path, name):
    (artefact / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    RetentionGates.from_pretrained(artefact)
    (artefact / TENSORS).unlink()
    refused(artefact, f"with {TENSORS} in .*found none")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 5 * 2**20])
def test_a_huge_header_is_refused_before_it_is_read(artefact, length):
    swap(artefact, struct.pack("<Q", length) + b"{}" * 10)
    refused(artefact, "is damaged .*header .* is larger than 4 MiB")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a":' * 20_000,
        b"[" * 100_000,
        b'{"__metadata__": {"a": 1}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"w": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 18446744073709551615]}}',
        b'{"w": {"dtype": "object", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": "wide", "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [1e99], "data_offsets": [0, 8]}}',
    ],
)
def test_headers_that_lie_are_refused(artefact, header):
    swap(artefact, packed(header, b"\x00" * 12))
    refused(artefact, "is damaged|do not fit")


def test_what_a_stranger_measured_can_be_saved_again(artefact, tmp_path):
    """Numbers beyond any float, and more budgets than a picture has room for."""
    strange = {f"global {i}%": 0.5 for i in range(1, 100)} | {"global full": 10**400, "per_head $x$": 0.1}
    rewrite(artefact, lambda config: config["training"].update(validation=strange))
    RetentionGates.from_pretrained(artefact).save_pretrained(tmp_path / "again")
    assert RetentionGates.from_pretrained(tmp_path / "again").training_record["validation"] == strange
    assert 0 < (tmp_path / "again" / "accuracy.png").stat().st_size < 2**19
    with open(artefact / "accuracy.png", "wb") as file:
        file.truncate(2**43)
    assert RetentionGates.from_pretrained(artefact).shape == SHAPE


def test_tensors_named_twice_never_load_as_two_things(artefact):
    header, data = header_of(artefact)
    name, entry = next((k, v) for k, v in header.items() if k.endswith("bias"))
    twice = json.dumps(header)[:-1] + f', "{name}": {json.dumps(entry)}}}'
    swap(artefact, packed(twice.encode(), data))
    refused(artefact, "is damaged")


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "layers.0.0.weight/../x", "a\nb", "\x00", "x" * 100_000, "stack.__class__"]
)
def test_names_never_become_paths_or_attributes(artefact, tmp_path, name):
    header, data = header_of(artefact)
    old = next(key for key in header if key.endswith("bias"))
    swap(artefact, packed({(name if k == old else k): v for k, v in header.items()}, data))
    refused(artefact, "do not fit its config: .*is missing")
    header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    swap(artefact, packed(header, data))
    refused(artefact, "do not fit its config: .*belongs to no gate")
    assert [path.name for path in tmp_path.iterdir()] == ["gates"]


def test_weights_that_are_not_finite_are_refused(artefact):
    header, data = header_of(artefact)
    start, end = header["shared.offset"]["data_offsets"]
    swap(artefact, packed(header, data[:start] + struct.pack("<f", float("nan")) * ((end - start) // 4) + data[end:]))
    refused(artefact, "numbers that are not finite")


@pytest.mark.parametrize("kind", ["I64", "BOOL", "U8"])
def test_tensors_of_other_kinds_are_refused(artefact, kind):
    header, data = header_of(artefact)
    size = {"I64": 8, "BOOL": 1, "U8": 1}[kind]
    header["w"] = {"dtype": kind, "shape": [1], "data_offsets": [len(data), len(data) + size]}
    swap(artefact, packed(header, data + b"\x00" * size))
    refused(artefact, f"'w' is of the kind {kind}")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_links_out_of_the_folder_are_refused(artefact, tmp_path, name):
    os.rename(artefact / name, tmp_path / "elsewhere")
    (artefact / name).symlink_to(tmp_path / "elsewhere")
    refused(artefact, f"{name} is a link to somewhere else")


def test_links_within_a_snapshot_of_the_hub_and_to_the_folder_load(artefact, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, name in enumerate((CONFIG, TENSORS)):
        os.rename(artefact / name, snapshot.parents[1] / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert RetentionGates.from_pretrained(snapshot).shape == SHAPE
    (tmp_path / "latest").symlink_to(snapshot)
    assert RetentionGates.from_pretrained(tmp_path / "latest").shape == SHAPE


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_file_counts_as_missing(artefact, name, make):
    (artefact / name).unlink()
    make(artefact / name)
    refused(artefact, f"with {name} in .*found none")


@pytest.mark.parametrize(("name", "largest"), [(CONFIG, "4 MiB"), (TENSORS, "4096 MiB")])
def test_huge_files_are_refused_before_they_are_read(artefact, name, largest):
    os.truncate(artefact / name, 2**43)
    refused(artefact, f"{name} is larger than {largest}")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"training": ' + "[" * 40 + "]" * 40 + "}",
        '{"format_version": 2, "format_version": 2}',
        '{"format_version": ' + "9" * 5000 + "}",
        '{"format_version": 1e999}',
        '{"format_version": NaN}',
        '{"format_version": [2]}',
        '"\\ud800"',
        '{"training": {"task": "\\ud800"}}',
        '{"training": {"\\udfff": 1}}',
    ],
)
def test_json_that_overreaches_is_refused(artefact, text):
    (artefact / CONFIG).write_text(text)
    refused(artefact, "is damaged|expected a gate artefact of format")


SIZES = [10**12, 10**30, 2**63, -1, 0, 1.5, "32", None, True, [32], {"a": 1}, float("nan"), float("inf")]


@pytest.mark.parametrize("field", ["hidden_size", "num_heads", "num_kv_heads", "head_dim"])
@pytest.mark.parametrize("value", SIZES)
def test_sizes_are_checked_before_anything_is_allocated(artefact, field, value):
    rewrite(artefact, lambda config: config["shape"].update({field: value}))
    refused(artefact)


@pytest.mark.parametrize("value", [x for x in SIZES if x is not None])
def test_widths_are_checked_before_anything_is_allocated(artefact, value):
    rewrite(artefact, lambda config: config["gate"].update(gate_hidden=value))
    refused(artefact)


@pytest.mark.parametrize("layers", [list(range(300_000)), [1, 0], [0, 0], [-1, 0], [0, 10**12], "01", 2, [[0], [1]]])
def test_layers_are_checked_before_they_are_built(artefact, layers):
    rewrite(artefact, lambda config: config["shape"].update(layers=layers))
    refused(artefact)


def test_many_layers_with_tensors_as_many_are_not_built_without_shapes_that_fit(artefact):
    header, data = header_of(artefact)
    header |= {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2} for i in range(300)}
    swap(artefact, packed(header, data))
    rewrite(artefact, lambda config: config["shape"].update(layers=list(range(300))))
    refused(artefact, "do not fit its config: layers.2.0.weight is missing")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("gate", {"depth": 3}),
        ("gate", {"name": ["dbtrim"]}),
        ("gate", {"name": "__class__"}),
        ("gate", {"init_half_life": 1e308}),
        ("gate", {"init_half_life": "long"}),
        ("gate", {"scoring": {"rows": 1}}),
        ("gate", {"budget_conditioned": 1}),
        ("gate", {"name": "fastkvzip", "bases": 10**12}),
        ("gate", {"activation": "os.system"}),
        ("memory", {"name": "none"}),
        ("memory", {"name": {}}),
        ("memory", {"features": 10**12}),
        ("memory", {"features": "many"}),
        ("memory", {"rank": 3}),
        ("shape", {"extra": 1}),
        ("shape", {"model_type": 3}),
        ("base", {"weight_hash": ["x"]}),
        ("training", {"calibration": [1, 2]}),
        ("training", {"calibration": CALIBRATION | {"seen": "long"}}),
        ("training", {"calibration": CALIBRATION | {"budgets": []}}),
        ("training", {"calibration": CALIBRATION | {"thresholds": [1.0]}}),
        ("training", {"calibration": CALIBRATION | {"budgets": [0.0, 1.0]}}),
        ("training", {"objective": 3}),
        ("training", {"seed": {}}),
        ("training", {"memory": [1]}),
        ("conventions", {"age_offset": 10**40}),
    ],
)
def test_settings_of_other_kinds_are_refused(artefact, part, change):
    rewrite(artefact, lambda config: config[part].update(change))
    refused(artefact)


def test_memories_of_impossible_size_are_refused_though_they_have_no_weights(artefact):
    header, data = header_of(artefact)
    gone = {name for name in header if name.startswith("memory.")}
    swap(artefact, packed(*without(header, data, gone)))
    rewrite(artefact, lambda config: config.update(memory={"name": "slots", "slots": 16}))
    assert RetentionGates.from_pretrained(artefact).memory.state_bytes() > 0
    for slots, told in ((2**30, "a memory of at most"), (2**40, "expected memory.slots of the kind int")):
        rewrite(artefact, lambda config, slots=slots: config["memory"].update(slots=slots))
        refused(artefact, told)


def without(header, data, gone):
    """Header and data of the other tensors."""
    left, kept = {}, b""
    for name, entry in header.items():
        if name == "__metadata__" or name in gone:
            continue
        start, end = entry["data_offsets"]
        left[name] = entry | {"data_offsets": [len(kept), len(kept) + end - start]}
        kept += data[start:end]
    return left, kept


@pytest.mark.parametrize("part", ["base", "shape", "gate", "memory", "training", "conventions", "storage"])
@pytest.mark.parametrize("value", [3, [], "text", True])
def test_parts_of_other_kinds_are_refused(artefact, part, value):
    rewrite(artefact, lambda config: config.update({part: value}))
    refused(artefact)


def mutated(content, edits):
    """Bytes overwritten, cut out, doubled or cut off."""
    found = bytearray(content)
    for kind, at, byte, length in edits:
        at %= max(1, len(found))
        match kind:
            case "set":
                found[at : at + 1] = bytes([byte])
            case "drop":
                del found[at : at + length]
            case "double":
                found[at:at] = found[at : at + length]
            case "cut":
                del found[at:]
    return bytes(found)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "set", "drop", "double", "cut"]),
        st.integers(0, 2**16),
        st.integers(0, 255),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=4,
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**12, -1, 0, 2**31]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
often = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def loads_or_says_why(folder):
    """Either gates that can be used and saved again, or one line."""
    try:
        gates = RetentionGates.from_pretrained(folder)
    except ValueError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert type(refusal) is ValueError
        assert len(str(refusal).splitlines()) == 1
        return False
    x = torch.zeros(1, 2, gates.shape.hidden_size)
    assert all(gates(layer, x).isfinite().all() for layer in range(gates.shape.num_layers))
    gates.save_pretrained(folder.parent / "again")
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = plain(tmp_path_factory.mktemp("fuzz") / "gates")
    return folder, {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}


def restored(whole):
    folder, contents = whole
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@often
@given(EDITS)
def test_fuzz_bytes_of_the_config(whole, edits):
    folder = restored(whole)
    (folder / CONFIG).write_bytes(mutated((folder / CONFIG).read_bytes(), edits))
    loads_or_says_why(folder)


@often
@given(EDITS)
def test_fuzz_bytes_of_the_tensors_never_load(whole, edits):
    folder = restored(whole)
    before = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(mutated(before, edits))
    assert loads_or_says_why(folder) == ((folder / TENSORS).read_bytes() == before)


@often
@given(EDITS)
def test_fuzz_bytes_of_the_header_under_a_fitting_digest(whole, edits):
    folder = restored(whole)
    content = (folder / TENSORS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    swap(folder, packed(mutated(content[8 : 8 + length], edits), content[8 + length :]))
    loads_or_says_why(folder)


@often
@given(st.integers(0, 2**16), VALUES)
def test_fuzz_values_of_the_config(whole, number, value):
    """Any one value, at any depth, becomes anything."""
    folder = restored(whole)
    config = json.loads((folder / CONFIG).read_text())
    places = [(config, key) for key in config]
    for owner, key in places:
        if isinstance(owner[key], dict):
            places += [(owner[key], inner) for inner in owner[key]]
    owner, key = places[number % len(places)]
    owner[key] = value
    (folder / CONFIG).write_text(json.dumps(config))
    loads_or_says_why(folder)
