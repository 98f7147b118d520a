"""Gates to and from the hub, without a network: only the calls that would leave the machine are replaced."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import LocalEntryNotFoundError

from retention.gates import GateSets, RetentionGates
from retention.gates.trim import Trim
from retention.types import ModelShape

SHAPE = ModelShape("qwen3", (0, 1), num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)
FILES = ["README.md", "gate_config.json", "gate_model.safetensors"]


@pytest.fixture
def gates():
    return RetentionGates(Trim(gate_hidden=4), SHAPE, {"name_or_path": "someone/base"}).requires_grad_(False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What was asked of the hub; uploads are copied into its `kept` folder."""
    asked = SimpleNamespace(repos=[], uploads=[], kept=tmp_path / "hub")

    def create_repo(self, repo_id, **settings):
        asked.repos.append((repo_id, settings))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id, folder_path, **settings):
        asked.uploads.append((repo_id, settings))
        for file in Path(folder_path).rglob("*"):
            if file.is_file():
                target = asked.kept / repo_id / file.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return asked


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_pushing_uploads_the_artefact_and_nothing_else(gates, hub, storage):
    url = gates.push_to_hub("me/gates", storage=storage, private=True, branch="v1", commit_message="First")
    assert url == "https://huggingface.co/me/gates/commit/1"
    assert hub.repos == [("me/gates", {"private": True, "exist_ok": True})]
    ((repo, settings),) = hub.uploads
    assert (repo, settings["revision"], settings["commit_message"]) == ("me/gates", "v1", "First")
    assert files(hub.kept / "me/gates") == FILES
    again = RetentionGates.from_pretrained(hub.kept / "me/gates")
    assert all(float((again.tensors()[k] - x).abs().max()) < 0.02 for k, x in gates.tensors().items())
    assert f"| storage | {storage} |" in (hub.kept / "me/gates/README.md").read_text()
    assert ModelCard.load(hub.kept / "me/gates/README.md").data.base_model == "someone/base"


def test_saving_can_push_under_the_folder_s_name_or_another(gates, hub, tmp_path):
    assert gates.save_pretrained(tmp_path / "mine") is None
    gates.save_pretrained(tmp_path / "mine", storage="bfloat16", push_to_hub=True)
    gates.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/other")
    assert [repo for repo, _ in hub.uploads] == ["me/mine", "me/other"]
    assert "| storage | bfloat16 |" in (hub.kept / "me/mine/README.md").read_text()
    assert files(tmp_path / "mine") == FILES


def test_sets_are_pushed_as_a_folder_of_artefacts_with_their_pictures(gates, hub):
    measured = copy.deepcopy(gates)
    measured.training_record = {"validation": {"global 5%": 0.5}}
    GateSets({"maths": gates, "chat": measured}).push_to_hub("me/sets", storage="float16")
    held = [f"{name}/{file}" for name in ("maths", "chat") for file in FILES]
    assert files(hub.kept / "me/sets") == sorted([*held, "chat/accuracy.png"])
    assert sorted(GateSets.from_pretrained(hub.kept / "me/sets")) == ["chat", "maths"]


def test_a_hub_id_is_read_from_a_snapshot_of_the_artefact_s_files(gates, monkeypatch, tmp_path):
    asked = []

    def snapshot(name, **settings):
        asked.append((name, settings))
        gates.save_pretrained(tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("retention.gates.loading.snapshot_download", snapshot)
    again = RetentionGates.from_pretrained("me/gates", revision="v1", token="t", local_files_only=True)
    assert again.base == gates.base
    ((name, settings),) = asked
    assert name == "me/gates"
    assert sorted(settings.pop("allow_patterns")) == sorted([*FILES, "accuracy.png"])
    assert settings == {"revision": "v1", "token": "t", "local_files_only": True}


def test_the_hub_s_own_cache_is_read(gates, monkeypatch, tmp_path):
    """A snapshot laid out as the hub's client lays it out: files are links to blobs."""
    repo = tmp_path / "models--me--gates"
    gates.save_pretrained(tmp_path / "fresh")
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / "c0ffee").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    for number, name in enumerate(FILES):
        (tmp_path / "fresh" / name).rename(repo / "blobs" / str(number))
        (repo / "snapshots" / "c0ffee" / name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert RetentionGates.from_pretrained("me/gates", cache_dir=tmp_path).config == Trim(gate_hidden=4)


@pytest.mark.parametrize(
    ("name", "why"), [("outputs/run/gates", "HFValidationError"), ("me/gates", "LocalEntryNotFoundError")]
)
def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(monkeypatch, tmp_path, name, why):
    def none(*args, **settings):
        raise LocalEntryNotFoundError("several\nlines")

    if why.startswith("Local"):
        monkeypatch.setattr("retention.gates.loading.snapshot_download", none)
    with pytest.raises(ValueError, match=f"expected a folder or hub id of gates, got '{name}': .*{why}") as caught:
        RetentionGates.from_pretrained(name)
    assert len(str(caught.value).splitlines()) == 1
