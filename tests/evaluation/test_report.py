"""Tests of the pictures, the page and the tables made from summary rows."""

import csv
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retention.evaluation.browser import browse
from retention.evaluation.claims import compare_all
from retention.evaluation.depth import by_depth
from retention.evaluation.evidence import recall_curves
from retention.evaluation.groups import by_group
from retention.evaluation.looks import Shown
from retention.evaluation.maps import allocation_heatmap, survival_heatmap
from retention.evaluation.pareto import pareto_curves, pareto_front
from retention.evaluation.plots import accuracy_curves, deferred_curve, depth_curve
from retention.evaluation.report import report_markdown, write_report
from retention.evaluation.results import Source, write_results
from retention.evaluation.statistics import summarise
from retention.evaluation.tables import table_markdown, table_text

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
            "evidence_recall": {"any": None, "mean": None}, "depth": (context + 0.5) / 6,
            "bytes": {"full": 2048, "kept": int(fraction * 2048), "peak": 4 * 2**20},
        } | changes
        for context in range(6)
        for turn in range(3)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rows = turns("full", "per_head", None, "full")
    for policy, scope, seed in POLICIES:
        rows += turns(policy, scope, seed, "5%") + turns(policy, scope, seed, "20%")
    aware = turns("snapkv", "per_head", None, "5%", protocol=AWARE)
    return rows + [row | {"score": float(row["turn"] == 0)} for row in aware]


@pytest.fixture(scope="module")
def summary(rows: list) -> list[dict[str, Any]]:
    return summarise(rows, resamples=100)


def numbers(picture: Path) -> list[dict[str, str]]:
    with Image.open(picture) as image:
        assert min(image.size) > 150
    assert picture.with_suffix(".svg").read_text().rstrip().endswith("</svg>")
    with picture.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


MANIFEST = {"caveats": ["One <small> model."], "model": {"name": "tiny"}, "seeds": [0, 1]}


def page(folder: Path, summary: list[dict], **changes: Any) -> str:
    told = {"title": "A & B", "manifests": {"one": MANIFEST}} | changes
    path = write_report(folder, summary=summary, **told)
    assert [file.name for file in folder.iterdir() if "report" in file.name] == ["report.html"]
    return path.read_text(encoding="utf-8")


class Read(HTMLParser):
    """What a page asks of the outside, and whether it is well formed and readable by a machine."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.asked: list[str] = []
        self.pictures: list[dict] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        held = dict(attrs)
        self.asked += [held[k] for k in ("src", "href", "action", "data") if k in held]
        if tag == "img" or held.get("role") == "img":
            self.pictures.append(held)
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def checked(text: str) -> Read:
    read = Read(text)
    assert all(asked.startswith(("data:", "#")) for asked in read.asked)
    assert not re.search(r"https?://|url\((?!data:)|<link|@import", text)
    assert all(picture.get("alt") or picture.get("aria-label") for picture in read.pictures)
    assert 'name="viewport"' in text
    return read


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
    drawn = numbers(allocation_heatmap({"gates": np.full((3, 2), 7.5)}, tmp_path / "allocation.png"))
    assert {(row["name"], row["entries"]) for row in drawn} == {("gates", "7.5")}


def test_the_pareto_front_is_what_nothing_beats(summary: list, tmp_path: Path) -> None:
    points = [
        {"kv_bytes_kept": size, "accuracy": accuracy} for size, accuracy in ((4, 0.5), (2, 0.4), (4, 0.6), (8, 0.6))
    ]
    assert [(row["kv_bytes_kept"], row["accuracy"]) for row in pareto_front(points)] == [(2, 0.4), (4, 0.6)]
    drawn = numbers(pareto_curves(summary, tmp_path / "pareto.png"))
    assert len(drawn) == 7
    assert {row["on_front"] for row in drawn} == {"0", "1"}
    assert next(row for row in drawn if row["policy"] == "full")["on_front"] == "0"


def test_depth_is_counted_in_fifths(rows: list, tmp_path: Path) -> None:
    depths = by_depth(rows, resamples=50)
    own = [row for row in depths if (row["policy"], row["budget"]) == ("gates", "5%")]
    assert [row["depth"] for row in own] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert [row["n_contexts"] for row in own] == [1, 1, 2, 1, 1]
    expected = [
        float(r["score"])
        for r in rows
        if (r["policy"], r["budget"]["requested"], r["example_id"]) == ("gates", "5%", "c5")
    ]
    assert own[-1]["accuracy"] == pytest.approx(np.mean(expected))
    drawn = numbers(depth_curve(depths, tmp_path / "d.png", "needle", budget="5%", protocol=AGNOSTIC))
    assert {row["policy"] for row in drawn} == {"gates", "snapkv", "full"}
    assert by_depth([row | {"depth": None} for row in rows]) == []


def test_page_is_self_contained_and_escaped(rows: list, summary: list, tmp_path: Path) -> None:
    accuracy_curves(summary, tmp_path / "curves.png")
    text = page(tmp_path, summary, claims=compare_all(rows, summary))
    read = checked(text)
    assert "A &amp; B" in text
    assert "One &lt;small&gt; model." in text
    assert text.count("data:image/png;base64,") == 1
    assert "model.name" in text
    assert "caveats</code>" not in text
    assert [name for name in read.headings if name != "A & B"] == ["Accuracy by budget", "What may be said", "Pictures", "Manifest"]  # fmt: skip


def test_runs_that_differ_are_listed_side_by_side(summary: list, tmp_path: Path) -> None:
    other = MANIFEST | {"model": {"name": "large"}, "caveats": ["Another caveat."]}
    text = page(tmp_path, summary, manifests={"one": MANIFEST, "two": other})
    row = re.search(r"<code>model.name</code></th>(.*?)</tr>", text).group(1)
    assert re.findall(r"<td>(\w+)</td>", row) == ["tiny", "large"]
    assert "<code>seeds</code></th><td>[0, 1]</td><td>" not in text
    assert "Another caveat." in text


def test_page_shows_every_setting_and_the_full_cache(summary: list, tmp_path: Path) -> None:
    text = html.unescape(page(tmp_path, summary))
    for row in summary:
        assert f"{row['accuracy']:.3f}" in text
        assert row["protocol"] in text
    assert "Full cache" in text
    assert "4.0 MiB" in text
    assert "1 training seed" in text


def test_page_needs_its_folder(summary: list, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="create it first"):
        write_report(tmp_path / "no", summary=summary, manifests={"one": {}}, title="t")


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
        ["| gates", "global, one seed"],
        ["| snapkv", "global"],
        ["| snapkv", "per head"],
    ]
    assert "above chance<br>409 B, peak 4.0 MiB" in lines[4]


def test_what_a_full_cache_that_learnt_little_loses_is_not_told(rows: list, tmp_path: Path) -> None:
    poor = [row | {"score": float(row["turn"] == 0)} if row["policy"] == "full" else row for row in rows]
    summary = summarise(poor, resamples=20)
    assert summary[0]["full_accuracy"] == pytest.approx(1 / 3)  # under .55, half the way from .1 to 1
    text = table_markdown(summary)
    assert text.count(", n/l above chance<br>") == 7
    assert text.count("n/l: the full cache does not get half the way") == 2
    assert page(tmp_path, summary).count(", n/l above chance</small>") == 7
    assert "n/l" not in table_markdown(summarise(rows, resamples=20))


def test_evidence_is_drawn_beside_the_accuracy(rows: list, tmp_path: Path) -> None:
    held = {"any": 0.5, "mean": 0.2, "weighted": 0.25}
    known = summarise([row | {"evidence_recall": held} for row in rows], resamples=20)
    drawn = numbers(recall_curves(known, tmp_path / "recall.png", "needle", protocol=AGNOSTIC))
    assert {(row["measure"], row["value"]) for row in drawn if row["measure"] != "accuracy"} == {
        ("evidence_recall_any", "0.5"), ("evidence_recall_weighted", "0.25"),
    }  # fmt: skip
    assert len(drawn) == 3 * 6
    with pytest.raises(ValueError, match="expected summary rows for evidence of 'needle'"):
        recall_curves(summarise(rows, resamples=20), tmp_path / "none.png", "needle", protocol=AGNOSTIC)


def test_text_fits_a_terminal(summary: list) -> None:
    wide = [row | {"policy": "a" * 60, "protocol": "p" * 200} for row in summary]
    for rows in (summary, wide):
        assert max(len(line) for line in table_text(rows).splitlines()) <= 110
    assert len(re.findall(r"\[\d\.\d\d, \d\.\d\d\]", table_text(summary))) == len(summary)


def test_markdown_report_has_tables_claims_and_caveats(rows: list, summary: list) -> None:
    text = report_markdown(summary, compare_all(rows, summary), {"one": MANIFEST}, "Title")
    assert text.startswith("# Title\n\n- One &lt;small&gt; model.\n")
    assert table_markdown(summary) in text
    assert "| p (Holm) | verdict | n | seeds |" in text


def test_a_table_without_chance_eviction_says_so_and_names_it_where_it_is(rows: list, summary: list) -> None:
    assert "random+protect was not run" in table_markdown(summary)
    both = summarise([*rows, *turns("random", "per_head", None, "5%")], resamples=50)
    agnostic = [row for row in both if row["protocol"] == AGNOSTIC]
    assert "random+protect was not run" not in table_markdown(agnostic)
    assert "| random+protect |" in table_markdown(agnostic)


def test_unequal_entries_are_marked(rows: list) -> None:
    over = [row | {"kept": row["kept"] * 1.05} if row["policy"] == "gates" else row for row in rows]
    text = table_markdown(summarise(over, resamples=50))
    assert text.count("**entries x1.050**") == 2
    assert "2 rows keep over 1% more or fewer entries than asked for" in text


NASTY = "</td><script>alert(1)</script>\x22'>|`{{ 7 * 7 }}\n\ud800"


def test_nothing_that_a_model_or_a_folder_is_called_becomes_markup(rows: list, tmp_path: Path) -> None:
    named = [row | {"task": f"needle {NASTY[:-1]}", "policy": f"{row['policy']} ({NASTY[:-1]})"} for row in rows]
    named += [row | {"task": f"needle {NASTY[:-1]}"} for row in rows if row["policy"] == "full"]
    summary = summarise(named, resamples=20)
    said = [row | {"prediction": NASTY, "question": NASTY} for row in named]
    turns = [{"question": NASTY, "answer": NASTY, "evidence": None}] * 3
    shown = [Shown("c0", [NASTY], np.zeros(1, bool), None, [], turns)]
    told = {"claims": compare_all(named, summary), "contexts": browse(named[0]["task"], shown, said, [], AGNOSTIC)}
    groups = by_group([row | {"groups": {NASTY: NASTY}} for row in said])
    text = page(
        tmp_path, summary, title=NASTY, manifests={NASTY: {"caveats": [NASTY], NASTY: NASTY}}, groups=groups, **told
    )
    assert "<script>alert" not in text
    assert checked(text).headings[0].startswith("</td>")
    assert text.count("<script>") == 1
    markdown = report_markdown(summary, told["claims"], {"one": {"caveats": [NASTY]}}, NASTY)
    assert "<script>" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {4, 6, 11}


def test_long_answers_are_shortened_and_unscored_ones_neither_right_nor_wrong(rows: list, tmp_path: Path) -> None:
    own = [row | {"prediction": "x" * 9000, "scored": row["turn"] == 0, "score": 0.0} for row in rows]
    turns = [{"question": "q", "answer": "a", "evidence": None}] * 3
    contexts = browse("needle", [Shown("c0", ["t"], np.zeros(1, bool), None, [], turns)], own, [], AGNOSTIC)
    text = page(tmp_path, summarise(rows, resamples=20), contexts=contexts)
    assert len(text) < 200_000
    assert "[... 7500 characters not shown ...]" in text
    assert text.count('class="unscored"') == 2 * text.count('class="wrong"') > 0


def test_rows_of_other_contexts_are_pointed_out(rows: list) -> None:
    assert "Not all rows rest" not in table_markdown(summarise(rows, resamples=20))
    fewer = [row for row in rows if row["policy"] != "gates" or row["example_id"] != "c5"]
    assert "Not all rows rest on the same contexts (5 to 6)" in table_markdown(summarise(fewer, resamples=20))
    others = [row | {"seed_data": int(row["policy"] == "gates")} for row in rows]
    assert "(different sets of 6)" in table_markdown(summarise(others, resamples=20))


def test_answers_are_counted_once_however_many_trainings_gave_them(rows: list) -> None:
    again = [row | {"seed_train": 1} for row in rows if row["policy"] == "gates"]
    assert "18 answers in 6 contexts, 2 training seeds" in table_markdown(summarise([*rows, *again], resamples=20))


def test_groups_of_two_protocols_are_told_apart(rows: list, summary: list, tmp_path: Path) -> None:
    text = page(tmp_path, summary, groups=by_group([row | {"groups": {"kind": "plain"}} for row in rows]))
    found = re.findall(r"aria-label=.groups of needle, ([^\"]+)", text)
    assert found == [AGNOSTIC, AWARE]


@pytest.mark.usefixtures("unrendered")
def test_every_task_of_several_has_costs_and_evidence_of_its_own(rows: list, tmp_path: Path) -> None:
    told = {
        "bytes": {"full": 2048, "kept": 99, "peak": 2**20, "items": {"keys": 60, "values": 39}},
        "missing_mass": {"mean": 0.2, "p90": 0.3, "by_layer": [0.1, 0.3]},
        "evidence_recall": {"any": 0.5, "mean": 0.2},
    }
    both = [row | told | {"task": task} for row in rows for task in ("needle", "other")]
    write_results(tmp_path, both, {"one": MANIFEST}, [Source(tmp_path)])
    for name in ("bytes", "missing_mass", "recall"):
        for task in ("needle", "other"):
            assert len((tmp_path / f"{name}@{task}.csv").read_text().splitlines()) > 3
            assert (tmp_path / f"{name}@{task}.svg").exists()
    assert "other: Evidence that is still held" in (tmp_path / "report.html").read_text()
