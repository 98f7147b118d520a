"""Answers that mean the same are the same, however they are written; nothing that is said is executed."""

import time

import pytest

from retention.tasks.scorers import SCORERS
from retention.tasks.scorers.expression import UnreadableError, same_value
from retention.tasks.scorers.maths import boxed, final_answer

SAME = [
    (r"so \boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
    ("the answer is 1,234.", "1234"),
    (r"\boxed{\left( 3,\frac{\pi}{2} \right)}", r"(3, \frac{\pi}{2})"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
    (r"\boxed{\sqrt[3]{8}}", "2"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{1\frac12}", "1.5"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    (r"\boxed{5\text{ cm}^2}", "5"),
    (r"\boxed{2,1}", "1,2"),
    (r"\boxed{\{1, 2\}}", r"\{2,1\}"),
    (r"\boxed{[0,1)}", "[0,1)"),
    (r"\boxed{(-\infty,2]}", r"(-\infty, 2]"),
    (r"\boxed{10\%}", "10%"),
    (r"\boxed{6-5i}", "6 - 5i"),
    (r"\boxed{\sin^2 x + \cos^2 x}", "1"),
    (r"\boxed{42_8}", "42_8"),
    (r"first \boxed{3}, then \boxed{4}", "4"),
    ("It is 33", "033"),
    (r"\boxed{3!}", "6"),
    (r"\boxed{|-2|}", "2"),
]
OTHER = [
    (r"\boxed{[0,1]}", "[0,1)"),
    (r"\boxed{(1,2)}", "(2,1)"),
    (r"\boxed{1,2}", "1,2,3"),
    (r"\boxed{9^{9^{9^9}}}", "3"),
    (r"\boxed{x+1}", "x+2"),
    (r"\boxed{\infty}", r"-\infty"),
    (r"\boxed{1/0}", "0"),
    (r"\boxed{p - q}", "q - p"),
    ("no number", "5"),
    (r"\boxed{", "5"),
]


@pytest.mark.parametrize(("said", "answer"), SAME)
def test_the_same(said, answer):
    assert SCORERS["math_equiv"](said, answer) == 1.0


@pytest.mark.parametrize(("said", "answer"), OTHER)
def test_another(said, answer):
    assert SCORERS["math_equiv"](said, answer) == 0.0


def test_what_is_boxed_last_is_the_answer_and_else_the_last_number():
    assert boxed(r"\boxed{\frac{a}{b}} and more") == r"\frac{a}{b}"
    assert final_answer("2, then -3.5") == "-3.5"
    assert final_answer("none") is None


@pytest.mark.parametrize("text", ["(1", "1 +", "\\foo", "__import__('os')", "1" * 500, "(1)(2", "x = y = z", "\u221a2"])
def test_what_cannot_be_read_is_said_so(text):
    with pytest.raises(UnreadableError):
        same_value(text, "1")


def test_towers_of_powers_and_factorials_take_no_time():
    started = time.perf_counter()
    for text in ("9^{9^{9^9}}", "99999!", "((9^9)!)!", "(" * 150 + "1" + ")" * 150):
        SCORERS["math_equiv"](f"\\boxed{{{text}}}", "7")
    assert time.perf_counter() - started < 1
