"""Pictures of costs and of distances, and what tasks tell besides the mean: from rows alone, numbers beside each."""

import csv

import pytest

from retention.evaluation.costs import byte_bars, latency_curve, missing_boxes
from retention.evaluation.depth import by_distance
from retention.evaluation.further import further_rows
from retention.evaluation.plots import distance_curve
from tests.evaluation.test_statistics import answer, full


def told(picture):
    assert picture.stat().st_size > 5000
    with picture.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows():
    cost = {"bytes": {"full": 8, "kept": 5, "peak": 12, "items": {"keys": 3, "values": 2}}}
    mass = [{"mean": 0.2, "p90": 0.3, "by_layer": [0.1 * i, 0.3]} for i in range(3)]
    found = [
        answer(example_id=f"c{i}", seen=100 * 4**i, distance=100.0 * 4**i, score=float(i > 0), missing_mass=mass[i],
               ms={"prefill": 9.0, "decode_per_token": 1.0 + i}, **cost)
        for i in range(3)
    ]  # fmt: skip
    whole = [full(example_id=f"c{i}", distance=100.0 * 4**i, ms={"prefill": 9.0, "decode_per_token": 2.0}, **cost) for i in range(3)]  # fmt: skip
    return [*found, *whole, answer(error="broken", ms=None), answer(missing_mass=None, ms=None, distance=None, example_id="c9", **cost)]  # fmt: skip


def test_bytes_are_stacked_item_by_item(rows, tmp_path):
    numbers = {(r["policy"], r["item"]): float(r["bytes"]) for r in told(byte_bars(rows, tmp_path / "b.png"))}
    assert numbers["gates", "keys"] == pytest.approx(3)
    assert numbers["full", "values"] == pytest.approx(2)
    assert numbers["gates", "peak"] == 12
    assert numbers["gates", "memory"] == 0


def test_missing_mass_has_a_box_per_layer(rows, tmp_path):
    numbers = told(missing_boxes(rows, tmp_path / "m.png"))
    assert [float(r["median"]) for r in numbers] == pytest.approx([0.1, 0.3])
    assert {r["policy"] for r in numbers} == {"gates"}


def test_time_runs_over_octaves_of_the_context(rows, tmp_path):
    numbers = told(latency_curve(rows, tmp_path / "l.png"))
    assert [(r["tokens"], float(r["median"])) for r in numbers if r["policy"] == "gates"] == [
        ("64", 1.0), ("256", 2.0), ("1024", 3.0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="expected summary rows for answers with 'ms'"):
        latency_curve([answer()], tmp_path / "n.png")


def test_accuracy_by_distance_leaves_out_what_has_none(rows, tmp_path):
    found = by_distance(rows, resamples=50)
    assert [(r["distance"], r["accuracy"]) for r in found if r["policy"] == "gates"] == [(64, 0), (256, 1), (1024, 1)]
    numbers = told(distance_curve(found, tmp_path / "d.png", "needle", budget="5%", protocol=rows[0]["protocol"]))
    assert [r["distance"] for r in numbers] == 2 * ["64", "256", "1024"]


def test_tasks_tell_their_further_figures_per_setting():
    def asked(turn, score, **changes):
        return answer(task="multi_query", example_id="multi_query/0", scored=True, scorer="symbol", question=f"q{turn}",
                      turn=turn, score=score, cluster="a", groups={}) | changes  # fmt: skip

    found = further_rows([asked(0, 1.0), asked(1, 0.0), asked(0, 1.0, policy="full"), answer()])
    worst = {(r["policy"], r["task"]): r["value"] for r in found if r["figure"] == "worst"}
    assert worst == {("gates", "multi_query"): 0.0, ("full", "multi_query"): 1.0}
