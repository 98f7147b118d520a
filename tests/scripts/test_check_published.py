"""The comparison with public code without that code: our side, what counts as a failure, the page."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("check_published")


def rows(script):
    made = []
    for check in script.CHECKS:
        row = {"absolute": 1e-9, "scale": 1.0} if check.scored else {}
        made.append(row | ({"heads": 16, "equal": 16, "entries": 0} if check.kept else {}))
    versions = {"kvpress": "1", "torch": "2", "transformers": "3"}
    return {"rows": made, "pyramid": {"theirs": [5, 3], "slope": [5, 3], "ours": [4, 4]}, "versions": versions}


def test_our_side_scores_and_keeps(script, tmp_path):
    from bench_kvpress import write_model
    from kvpress_worker import load_model

    write_model(tmp_path, script.SMALL | {"num_hidden_layers": 1}, 0)
    model, ids = load_model(tmp_path), torch.randperm(999)[None, : script.LENGTH] + 1
    for check in (script.CHECKS[0], script.CHECKS[-1]):
        scores, kept = script.own(check, model, ids)
        assert scores.shape == kept.shape == (1, 4, script.LENGTH)
        assert int(kept.sum()) == 4 * check.budget


def test_differences_are_failures(script):
    assert script.failures(rows(script)) == []
    for key, value, words in (("absolute", 1e-3, "scores differ"), ("entries", 9, "9 kept entries differ")):
        result = rows(script)
        result["rows"][0][key] = value
        assert [words in told for told in script.failures(result)] == [True]
    result = rows(script)
    result["pyramid"]["theirs"] = [9, 3]
    assert "PyramidKVPress has [9, 3]" in script.failures(result)[0]


def test_the_page_names_every_check_and_deviation(script):
    text = script.page(rows(script), 3)
    for check in script.CHECKS:
        assert check.press in text
        assert check.ours in text
        assert check.deviation[1:] in text
