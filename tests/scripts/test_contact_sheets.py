"""Contact sheets: one picture per task, with its evidence outlined and its questions below."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retention.tasks.needle import Needle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("contact_sheets")


def test_a_sheet_shows_every_image_and_outlines_the_evidence(script):
    example = Needle(n_images=10, tier="rendered").example(0, "test", 0, style="natural")
    pixels = np.asarray(script.sheet(example))
    example.turns[0].evidence = []
    changed = (pixels != np.asarray(script.sheet(example))).any(-1)
    ref = Needle(n_images=10, tier="rendered").example(0, "test", 0, style="natural").turns[0].evidence[0]
    rows, columns = np.nonzero(changed)
    left, top = script._corner(ref.image)
    assert (rows.min() - top) // (script.TILE // 4) == ref.row
    assert (columns.min() - left) // (script.TILE // 4) == ref.column
    assert pixels.shape[1] == script.COLUMNS * (script.TILE + script.GAP) + script.GAP


def test_sheets_are_written_by_name_and_unknown_names_are_refused(script, tmp_path, capsys):
    files = script.main(["tile_index_list", "long_trace", "recall", "--out", str(tmp_path), "--tier", "rendered"])
    assert [file.name for file in files] == ["tile_index_list.png", "long_trace.png", "recall.png"]
    for file in files:
        with Image.open(file) as drawn:
            assert min(drawn.size) > 50
    with pytest.raises(SystemExit):
        script.main(["docvqa", "--out", str(tmp_path)])
    assert "expected procedural tasks out of" in capsys.readouterr().err
