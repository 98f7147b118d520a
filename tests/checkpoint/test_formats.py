"""Older formats load for ever, newer ones are refused in words, and the config says what it should."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from retention.checkpoint import FORMAT_VERSION
from retention.checkpoint.format import UPGRADES
from retention.gates import RetentionGates
from retention.gates.calibration import Calibration
from retention.gates.trim import Trim
from tests.tiny import tiny_qwen3

FIXTURES = Path(__file__).parents[1] / "fixtures"
OLDEST = FIXTURES / "gates_v1"


def test_every_older_format_has_a_way_up_and_a_fixture():
    assert sorted(UPGRADES) == list(range(1, FORMAT_VERSION))
    for version in UPGRADES:
        config = json.loads((FIXTURES / f"gates_v{version}" / "gate_config.json").read_text())
        assert config["format_version"] == version


def test_gates_of_format_1_score_as_they_did():
    told = json.loads((FIXTURES / "gates_v1_expected.json").read_text())
    gates = RetentionGates.from_pretrained(OLDEST).requires_grad_(False)
    x = torch.linspace(-1, 1, 3 * 64).view(1, 3, 64)
    for layer, expected in enumerate(told["log_beta"]):
        torch.testing.assert_close(gates(layer, x), torch.tensor(expected), rtol=1e-4, atol=0)
    held = sum(float(x.double().abs().sum()) for x in gates.memory.state_dict().values())
    assert held == pytest.approx(told["memory_sum"], rel=1e-6)
    assert gates.base == {"name_or_path": "tiny-base"} | {k: gates.base[k] for k in ("config_hash", "weight_hash")}
    assert (gates.objective, gates.decays) == ("distillation", True)
    assert Calibration.from_record(gates.training_record).at(torch.tensor([8.0])) == pytest.approx(-0.4)


def test_gates_of_format_1_are_saved_as_the_present_one(tmp_path):
    old = RetentionGates.from_pretrained(OLDEST)
    old.save_pretrained(tmp_path / "gates")
    assert json.loads((tmp_path / "gates" / "gate_config.json").read_text())["format_version"] == FORMAT_VERSION
    again = RetentionGates.from_pretrained(tmp_path / "gates")
    assert all(torch.equal(again.tensors()[name], x) for name, x in old.tensors().items())
    assert again.training_record == old.training_record


def test_the_first_artefacts_without_a_digest_load(tmp_path):
    shutil.copytree(OLDEST, tmp_path / "gates")
    path = tmp_path / "gates" / "gate_config.json"
    config = json.loads(path.read_text())
    for key in ("tensors_sha256", "conventions"):
        del config[key]
    path.write_text(json.dumps(config))
    assert RetentionGates.from_pretrained(tmp_path / "gates").config == Trim(gate_hidden=4)
    path.write_text(json.dumps(config | {"format_version": FORMAT_VERSION, "storage": "float32", "conventions": {}}))
    with pytest.raises(ValueError, match="lacks tensors_sha256"):
        RetentionGates.from_pretrained(tmp_path / "gates")


@pytest.mark.parametrize(
    ("key", "value"), [("age_offset", 1), ("age_offset", False), ("log_beta", "fp16"), ("units", "seconds")]
)
def test_scores_of_other_conventions_are_refused(tmp_path, key, value):
    shutil.copytree(OLDEST, tmp_path / "gates")
    path = tmp_path / "gates" / "gate_config.json"
    config = json.loads(path.read_text())
    config["conventions"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"made under the convention '{key}' {value!r}"):
        RetentionGates.from_pretrained(tmp_path / "gates")


def test_the_config_tells_where_the_base_came_from(tmp_path):
    model = tiny_qwen3()
    model.config.name_or_path, model.config._commit_hash = "someone/base", "c0ffee"
    assert RetentionGates.for_model(Trim(), model).base["revision"] is None
    gates = RetentionGates.for_model(Trim(), model, revision="v1.2")
    gates.save_pretrained(tmp_path / "gates")
    config = json.loads((tmp_path / "gates" / "gate_config.json").read_text())
    assert [config["base"][k] for k in ("name_or_path", "revision", "commit")] == ["someone/base", "v1.2", "c0ffee"]
    assert {"python", "torch", "transformers", "retention", "git", "git_dirty"} <= config["versions"].keys()
    RetentionGates.from_pretrained(tmp_path / "gates").check(tiny_qwen3())


def test_the_config_tells_when_scores_are_read():
    model = tiny_qwen3()
    now, later = (RetentionGates.for_model(Trim(delayed=delayed), model).conventions() for delayed in (False, True))
    assert "the token itself" in now["score_time"]
    assert "the token behind it" in later["score_time"]
    assert {k: v for k, v in now.items() if k != "score_time"} == {k: later[k] for k in now if k != "score_time"}
