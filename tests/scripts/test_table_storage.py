"""The table of storages: what it stores, what it says of scores, and that rounding more is worse."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from retention.checkpoint import STORAGES
from retention.gates import RetentionGates
from retention.gates.dbtrim import DBTrim
from retention.types import ModelShape

ROOT = Path(__file__).parents[2]
SHAPE = ModelShape("qwen3", (0, 1), num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("table_storage")


@pytest.fixture
def gates(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RetentionGates(DBTrim(gate_hidden=32), SHAPE).save_pretrained(tmp_path / "gates")
    return tmp_path / "gates"


def test_coarser_storage_moves_scores_more(script, gates, tmp_path):
    hidden = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(0))
    exact, moved = script.scored(gates, hidden), {}
    for storage in (*STORAGES, script.WHOLE):
        found = script.scored(script.stored(gates, tmp_path / storage, storage), hidden)
        moved[storage] = float((found - exact).abs().max())
    assert moved["float32"] == 0 < moved["float16"] < moved["bfloat16"]
    assert moved["float16"] < moved["int8"] < moved[script.WHOLE]


def test_the_page_shows_bytes_and_paired_differences(script):
    same, worse = np.ones((2, 1, 4)), np.array([[[1.0, 1, 0, 1]], [[1.0, 1, 1, 1]]])
    shared = {"task": "needles", "n": 8, "n_contexts": 4}
    cells = [shared | {"policy": "full", "budget": "100%", "storage": "float32", "accuracy": 1.0, "scores": same}]
    for storage, scores in (("float32", same), ("int8", worse)):
        for policy in script.POLICIES:
            cells.append(
                shared
                | {"policy": policy, "budget": "5%", "storage": storage, "accuracy": scores.mean(), "scores": scores}
            )
    files = [
        {"storage": "float32", "bytes": 1000, "error": 0.0},
        {"storage": "int8", "bytes": 300, "error": 0.02},
        {"storage": script.WHOLE, "bytes": None, "error": 0.04},
    ]
    text = script.page(cells, files, ("5%",), 1)
    assert "| int8 | 300 | 0.30 | 0.02 |" in text
    assert f"| {script.WHOLE} | - | - | 0.04 |" in text
    assert "| int8 | 0.875 -12.50 [" in text
    assert "moves scores 2.0 times as far" in text
    assert "- int8: at worst -12.50 points against float32 in a cell; 2 of 16 answers are scored otherwise." in text
