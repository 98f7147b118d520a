"""The solver that sees questions alone: at chance on fair tasks, above it where a question or an answer gives away."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from retention.tasks.three_statements import ThreeStatements

ROOT = Path(__file__).parents[2]
TASK = ThreeStatements(kind="ordering")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("question_only")


class Told(ThreeStatements):
    """Ends each question with how its answer begins."""

    def example(self, *args, **kwargs):
        made = super().example(*args, **kwargs)
        return replace(made, turns=[replace(turn, question=f"y or n? {turn.answer[0]}") for turn in made.turns])


class Always(ThreeStatements):
    """Has one answer."""

    def example(self, *args, **kwargs):
        made = super().example(*args, **kwargs)
        return replace(made, turns=[replace(turn, answer="no") for turn in made.turns])


def test_questions_and_answers_that_give_away_are_found(script):
    fair = script.asked(TASK, draws=400)
    assert (fair.n, fair.chance) == (400, 0.5)
    assert abs(fair.solver - 0.5) < 0.1
    told = script.asked(Told(kind="ordering"), draws=40)
    assert (told.solver, told.leaks) == (1.0, True)
    assert told.commonest < 0.8
    always = script.asked(Always(kind="ordering"), draws=20)
    assert (always.solver, always.commonest, always.leaks) == (1.0, 1.0, True)


def test_a_line_per_task_and_a_code_that_says_whether_one_leaks(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "SLACK", 0.3)
    assert script.main(["three_statements_order", "jigsaw", "--draws", "40"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "task",
        "three_statements_order",
        "jigsaw",
    ]
    monkeypatch.setattr(script, "SLACK", -1.0)
    assert script.main(["jigsaw", "--draws", "4"]) == 1
    assert "above chance" in capsys.readouterr().out
    for wrong in (["docvqa"], ["jigsaw", "--draws", "1"]):
        with pytest.raises(SystemExit):
            script.main(wrong)
