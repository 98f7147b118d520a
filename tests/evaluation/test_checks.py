"""What a manifest says of rows: a changed answer changes the hash, the order does not; what is over budget is counted."""

from retention.evaluation.checks import over_budget, questions_hash
from tests.evaluation.test_statistics import answer


def test_the_hash_is_of_questions_and_answers_alone():
    rows = [answer(question="a", turn=0), answer(question="b", turn=1)]
    same = questions_hash(rows)
    assert same == questions_hash([*rows[::-1], answer(question="a", policy="full", score=0.0)])
    assert same != questions_hash([rows[0] | {"answer": "8"}, rows[1]])


def test_rows_over_their_budget_are_counted():
    rows = [answer(kept=50), answer(kept=51), answer(kept=99, error="broken")]  # 5 entries in each of 10 heads
    assert over_budget(rows) == 1
