"""How answers are scored."""

import pytest

from retention.tasks.scorers import SCORERS, exact, norm, overlap, symbol


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Seven\n of   NINE. ", "seven of nine"),
        ("\uff17", "7"),
        ("7.", "7"),
        ("7 .", "7"),
        ("7.5", "7.5"),
        ("...", ".."),
        ("", ""),
    ],
)
def test_norm_folds_case_width_space_and_one_full_stop(text, expected):
    assert norm(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("7", "7", 1.0),
        (" Blue Whale.", "blue  whale", 1.0),
        ("7 of them", "7", 0.0),
        ("8", "7", 0.0),
        ("", "7", 0.0),
        ("77", "7", 0.0),
    ],
)
def test_exact_wants_the_whole_answer(prediction, answer, score):
    assert exact(prediction, answer) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("7", "7", 1.0),
        ("7, I think", "7", 1.0),
        (" 7.\n", "7", 1.0),
        ("Red!", "red", 1.0),
        ("7 8", "7", 1.0),
        ("8 7", "7", 0.0),
        ("the 7", "7", 0.0),
        ("77", "7", 0.0),
        ("", "7", 0.0),
        (" . ", "7", 0.0),
    ],
)
def test_symbol_reads_the_first_word(prediction, answer, score):
    assert symbol(prediction, answer) == score


def test_scorers_are_named():
    assert {"exact": exact, "overlap": overlap, "symbol": symbol} == SCORERS


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("a red cat", "A red cat.", 1.0),
        ("a red", "a red cat on a mat", 1.0),  # cut off at the most new tokens
        ("a dog", "a cat", 0.5),
        ("the dog is big", "a cat", 0.0),
        ("", "a cat", 0.0),
        ("a a a a", "a", 0.4),
    ],
)
def test_overlap_counts_common_words(prediction, answer, score):
    assert overlap(prediction, answer) == pytest.approx(score)
