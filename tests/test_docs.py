"""Every page and notebook of the documentation runs as written; every command would start; every link leads somewhere."""

import json
import re
import shlex
import tomllib
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pages import ROOT, blocks, check, commands, inline_commands, run_python

DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
CHECKED = {"python", "bash", "json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Gates after a few steps, for all pages."""
    from retention.config import compose
    from retention.training.run import run

    folder = tmp_path_factory.mktemp("docs") / "run"
    small = ["trainer=smoke", "data.batch_size=2", "data.val_examples=2", "data.n_turns=4", "logger=csv"]
    small += ["task.n_images=4", "task.n_needles=12", "task.n_asked=6", "task.n_turns=4"]
    return run(compose("train", [*small, f"output_dir={folder}"]))


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """An empty folder to run in, with what readers have by then: gates, and models under the names the pages use."""
    (tmp_path / "outputs" / "latest").mkdir(parents=True)
    (tmp_path / "outputs" / "latest" / "gates").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def downloads(folder: Path) -> None:
    """Tiny models and gates in the layouts of those that pages name."""
    from safetensors.torch import save_file

    from tests import hub
    from tests.interop import published
    from tests.tiny import tiny_qwen3

    model = folder / "Qwen" / "Qwen3-8B"
    tiny_qwen3(vocab_size=hub.VOCAB).save_pretrained(model)
    hub.tokenizer({}).save_pretrained(model)
    tensors, config = published.kvzap(8)
    gates = folder / "KVzap-mlp-Qwen3-8B"
    gates.mkdir()
    save_file(tensors, gates / "model.safetensors")
    (gates / "config.json").write_text(json.dumps(config))


def at_hand(name: str) -> dict[str, Any]:
    """What a page takes for granted."""
    if name != "artefact.md":
        return {}
    import retention as rt
    from retention.attach.switch import use_gates
    from retention.gates.sets import GateSets
    from retention.memory import MEMORIES, RetentionMemory

    gates, others, trained = (rt.RetentionGates.from_pretrained("outputs/latest/gates") for _ in range(3))
    trained.memory = RetentionMemory(MEMORIES["slots"](), trained.shape)
    config, policy = rt.CacheConfig(rt.Budget(16)), rt.POLICIES["db_trim_kv"]()
    given = {"model": rt.load_frozen("embedded")[0], "policy": policy, "config": config, "evicting": rt.evicting}
    return given | {"gates": gates, "others": others, "trained": trained, "GateSets": GateSets, "use_gates": use_gates}


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_its_python_runs(name, place):
    if "Qwen/Qwen3-8B" in PAGES[name]:
        downloads(place)
    run_python(PAGES[name], name, at_hand(name))


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if commands(text) or inline_commands(text)])
def test_its_commands_would_start(name):
    for words in (*commands(PAGES[name]), *inline_commands(PAGES[name])):
        check(words)


@pytest.mark.parametrize("name", PAGES)
def test_its_blocks_are_of_a_kind_that_is_checked(name):
    assert set(re.findall(r"^```(\w+)\n", PAGES[name], re.MULTILINE)) <= CHECKED
    for block in blocks(PAGES[name], "json"):
        json.loads(block)


@pytest.mark.parametrize("name", PAGES)
def test_its_links_lead_somewhere(name):
    prose = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    for link, _, anchor in (x.partition("#") for x in re.findall(r"\]\(([^)\s]+)\)", prose)):
        page = (DOCS / name).parent / link if link else DOCS / name
        assert link.startswith("http") or page.exists(), link
        if anchor and page.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles], anchor


def test_every_file_that_a_paper_page_names_exists():
    named = 0
    for name in (name for name in PAGES if name.startswith("papers/")):
        for cell in re.findall(r"^\| [^|]+ \| (`[^|]+`)[^|]*\|$", PAGES[name], re.MULTILINE):
            files = [word for word in re.findall(r"`([^`]+)`", cell) if word.endswith((".py", ".yaml"))]
            folder = Path(files[0]).parent if files else ROOT
            for file in (f for text in files for f in _expanded(text)):
                assert (ROOT / file).is_file() or (ROOT / folder / file).is_file(), (name, file)
                named += 1
    assert named > 30


def _expanded(text: str) -> list[str]:
    """`a_{b,c}.py` as the two files it stands for."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", text)
    return [found[1] + part + found[3] for part in found[2].split(",")] if found else [text]


def test_the_navigation_and_the_api_name_what_exists():
    def leaves(tree):
        return [tree] if isinstance(tree, str) else [x for part in tree for x in leaves(next(iter(part.values())))]

    for page in leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]):
        assert (DOCS / page).is_file(), page
    named = re.findall(r"^::: (\S+)$", PAGES["api.md"], re.MULTILINE)
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute) or util.find_spec(name), name
    public = {f"retention.{name}" for name in import_module("retention").__all__}
    assert public <= {*named, *re.findall(r"`(retention\.[A-Z]+)`", PAGES["api.md"])}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_its_code_gave(file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    notebooks, book = import_module("run_notebooks"), json.loads(file.read_text())
    assert book["metadata"]["retention"]["outputs_of"] == notebooks.digest(book), "run scripts/run_notebooks.py anew"
    shown = [cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code"]
    kinds = [[output["output_type"] for output in outputs] for outputs in notebooks.outputs(book, file.name)]
    assert kinds == [[output["output_type"] for output in outputs] for outputs in shown]
    assert any("display_data" in of_cell for of_cell in kinds)


def test_a_policy_takes_twenty_lines():
    book = json.loads((DOCS / "notebooks" / "own_policy.ipynb").read_text())
    first = next("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code")
    assert "(Policy)" in first
    assert len([line for line in first.splitlines() if line.strip()]) <= 20


def test_the_release_files_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            versions = job.get("strategy", {}).get("matrix", {}).get("python", [])
            assert not versions or min(tuple(map(int, version.split("."))) for version in versions) == least
            for line in filter(None, "\n".join(step.get("run", "") for step in job["steps"]).splitlines()):
                words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "x", line))
                if words[0] == "bash":
                    assert (ROOT / words[1]).is_file(), line
                elif words[0] != "grep":
                    check(words)


def test_the_workflow_tries_both_ends_of_the_supported_versions():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    ends = re.search(r'"--end", choices=\(([^)]*)\)', (ROOT / "scripts" / "test_compat.py").read_text())
    assert ends is not None
    assert jobs["compat"]["strategy"]["matrix"]["end"] == re.findall(r'"(\w+)"', ends[1])
