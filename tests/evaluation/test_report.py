"""Tests of the pictures, the page and the tables made from summary rows."""

import csv
import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retention.evaluation.plots import (
    accuracy_curves,
    deferred_curve,
    patch_strip,
    survival_heatmap,
)
from retention.evaluation.report import table_markdown, table_text, write_report
from retention.evaluation.statistics import summarise

AGNOSTIC = "agnostic/multi/after_prefill/original"
AWARE = "aware/multi/after_prefill/original"
POLICIES = [("gates", "global", 0), ("snapkv", "global", None), ("snapkv", "per_head", None)]


def turns(policy: str, scope: str, seed: int | None, budget: str, **changes: Any) -> list[dict]:
    fraction = 1.0 if budget == "full" else float(budget.rstrip("%")) / 100
    rng = np.random.default_rng(len(policy + budget))
    return [
        {
            "task": "needle", "policy": policy, "scope": scope, "protocol": AGNOSTIC,
            "positions": "original", "example_id": f"c{context}", "turn": turn, "n_turns": 3,
            "seed_data": 0, "seed_train": seed, "prediction": "7", "answer": "7", "chance": 0.1,
            "score": float(rng.random() < 0.5 + fraction / 2), "kept": int(fraction * 1000),
            "seen": 100, "entries_full": 1000, "error": None,
            "budget": {"requested": budget, "resolved": int(100 * fraction), "fraction": fraction},
            "evidence_recall": {"any": None, "mean": None},
            "bytes": {"full": 2048, "kept": int(fraction * 2048), "peak": 4 * 2**20},
        } | changes
        for context in range(6)
        for turn in range(3)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def summary() -> list[dict[str, Any]]:
    rows = turns("full", "per_head", None, "full")
    for policy, scope, seed in POLICIES:
        rows += turns(policy, scope, seed, "5%") + turns(policy, scope, seed, "20%")
    aware = turns("snapkv", "per_head", None, "5%", protocol=AWARE)
    rows += [row | {"score": float(row["turn"] == 0)} for row in aware]
    return summarise(rows, resamples=100)


def numbers(picture: Path) -> list[dict[str, str]]:
    with Image.open(picture) as image:
        assert min(image.size) > 150
    with picture.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def page(folder: Path, summary: list[dict], **changes: Any) -> str:
    manifest = {"caveats": ["One <small> model."], "model": {"name": "tiny"}, "seeds": [0, 1]}
    told = {"title": "A & B", "manifest": manifest, "examples": None} | changes
    path = write_report(folder, summary=summary, **told)
    assert [file.name for file in folder.iterdir() if "report" in file.name] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_curves_draw_one_protocol_and_write_their_numbers(summary: list, tmp_path: Path) -> None:
    drawn = numbers(accuracy_curves(summary, tmp_path / "new" / "curves.png"))
    settings = {(row["policy"], row["scope"]) for row in drawn}
    assert settings == {(policy, scope) for policy, scope, _ in POLICIES}
    drawn = numbers(accuracy_curves(summary, tmp_path / "curves.png", protocol=AWARE))
    assert [row["turns"] for row in drawn] == ["first turn", "later turns"]
    assert [float(row["accuracy"]) for row in drawn] == [1.0, 0.0]


def test_curves_join_the_turns_that_do_not_differ(summary: list, tmp_path: Path) -> None:
    same = [row | {"accuracy_first_turn": row["accuracy_later_turns"]} for row in summary]
    drawn = numbers(accuracy_curves(same, tmp_path / "curves.png"))
    assert {row["turns"] for row in drawn} == {"all turns"}


def test_deferred_curve_tells_protocols_apart(summary: list, tmp_path: Path) -> None:
    path = deferred_curve(summary, tmp_path / "deferred.png", "needle", policies=["snapkv"])
    drawn = numbers(path)
    names = {row["policy"] for row in drawn}
    assert names == {"full cache", "snapkv (agnostic)", "snapkv (aware)"}
    aware = [float(row["accuracy"]) for row in drawn if row["policy"] == "snapkv (aware)"]
    assert aware == [1.0, 0.0, 0.0]


def test_pictures_refuse_names_that_are_not_there(summary: list, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        accuracy_curves(summary, tmp_path / "a.png", protocol="nowhere")
    with pytest.raises(ValueError, match="nothing"):
        deferred_curve(summary, tmp_path / "a.png", "nothing")


def test_survival_writes_every_head(tmp_path: Path) -> None:
    survival = {"gates, global": np.eye(3, 2), "snapkv": np.zeros((3, 2))}
    drawn = numbers(survival_heatmap(survival, tmp_path / "survival.png"))
    assert len(drawn) == 12
    assert drawn[0] == {"name": "gates, global", "layer": "0", "head": "0", "kept_fraction": "1.0"}
    with pytest.raises(ValueError, match="layers, heads"):
        survival_heatmap({}, tmp_path / "none.png")


@pytest.mark.parametrize("n", [1, 9, 16])
def test_patch_strip_wraps_and_takes_endless_lives(n: int, tmp_path: Path) -> None:
    life = np.full((n, 2, 2), 8.0)
    life[0] = [[0.0, 1.0], [64.0, np.inf]]
    evidence = life > 60
    images = np.full((n, 8, 8, 3), 200, dtype=np.uint8)
    drawn = numbers(patch_strip(images, life, tmp_path / "p.png", label="life", evidence=evidence))
    assert len(drawn) == 4 * n
    assert [row["evidence"] for row in drawn[:4]] == ["0", "0", "1", "1"]


def test_patch_strip_refuses_more_than_two_rows(tmp_path: Path) -> None:
    images = np.zeros((17, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="16 images"):
        patch_strip(images, np.ones((17, 2, 2)), tmp_path / "p.png", label="life")


def test_page_is_self_contained_and_escaped(summary: list, tmp_path: Path) -> None:
    accuracy_curves(summary, tmp_path / "curves.png")
    text = page(tmp_path, summary)
    assert "A &amp; B" in text
    assert "One &lt;small&gt; model." in text
    assert text.count("data:image/png;base64,") == 1
    assert not re.search(r"https?://|<script|<link", text)
    assert "model.name" in text
    assert "caveats</code>" not in text


def test_page_shows_every_setting_and_the_full_cache(summary: list, tmp_path: Path) -> None:
    text = html.unescape(page(tmp_path, summary))
    for row in summary:
        assert f"{row['accuracy']:.3f}" in text
        assert row["protocol"] in text
    assert "Full cache" in text
    assert "4.0 MiB" in text
    assert "1 training seed" in text


def test_page_shows_example_turns(summary: list, tmp_path: Path) -> None:
    told = {"example_id": "c3", "turn": 1, "question": "Which <b>?", "answer": "7"}
    told["predictions"] = {"gates, global": "7", "snapkv": "<none>"}
    text = page(tmp_path, summary, examples=[told, told | {"task": "x", "scores": {"snapkv": 0}}])
    assert "Which &lt;b&gt;?" in text
    assert "&lt;none&gt;" in text
    assert text.count("(score 0)") == 1


def test_page_needs_its_folder(summary: list, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="create it first"):
        write_report(tmp_path / "no", summary=summary, manifest={}, title="t", examples=None)


def test_tables_survive_missing_numbers(tmp_path: Path) -> None:
    lonely = turns("gates", "global", 0, "5%", chance=None, score=0.0)
    summary = summarise(lonely, resamples=50)
    assert "n/a" in table_text(summary)
    assert "n/a of full" in table_markdown(summary)
    assert "n/a of full" in page(tmp_path, summary)
    accuracy_curves(summary, tmp_path / "curves.png")


def test_markdown_has_policies_down_and_budgets_across(summary: list) -> None:
    lines = table_markdown(summary).splitlines()
    assert lines[0].startswith(f"**needle**, `{AGNOSTIC}`: full cache ")
    assert lines[2] == "| policy | scope | 20% | 5% |"
    assert [line.split(" | ")[:2] for line in lines[4:7]] == [
        ["| gates", "global"],
        ["| snapkv", "global"],
        ["| snapkv", "per head"],
    ]
    assert "of full<br>409 B, peak 4.0 MiB" in lines[4]


def test_text_fits_a_terminal(summary: list) -> None:
    wide = [row | {"policy": "a" * 60, "protocol": "p" * 200} for row in summary]
    for rows in (summary, wide):
        assert max(len(line) for line in table_text(rows).splitlines()) <= 110
    assert len(re.findall(r"\[\d\.\d\d, \d\.\d\d\]", table_text(summary))) == len(summary)
