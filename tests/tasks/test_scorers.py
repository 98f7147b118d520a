"""How answers are scored: every scorer on hand-computed cases."""

import pytest

from retention.tasks.scorers import SCORERS, readable
from retention.tasks.scorers.choice import chosen_letter
from retention.tasks.scorers.text import edits, norm
from retention.tasks.scorers.vqa import vqa_norm

OPTIONS = ["a red box", "a dark red box", "blue", "None of these"]
TEN = ["cat"] * 4 + ["a cat"] * 2 + ["dog"] * 2 + ["two cats", "bird"]
TABLE = [
    ("exact", "7", "7", 1.0),
    ("exact", " Blue Whale.", "blue  whale", 1.0),
    ("exact", "7 of them", "7", 0.0),
    ("exact", "8", ["7", "8"], 1.0),
    ("symbol", "7, I think", "7", 1.0),
    ("symbol", "Red!", "red", 1.0),
    ("symbol", "the 7", "7", 0.0),
    ("symbol", "77", "7", 0.0),
    ("overlap", "a red", "a red cat on a mat", 1.0),  # cut off at the most new tokens
    ("overlap", "a dog", "a cat", 0.5),
    ("overlap", "a a a a", "a", 0.4),
    ("token_in_split", "it says Heron today", "heron", 1.0),
    ("token_in_split", "herons", "heron", 0.0),
    ("contains_any", "The Green Glass lamp", ["tin", "green glass"], 1.0),
    ("contains_any", "tin-", ["green glass"], 0.0),
    ("contains_all", "A, B and C", ["a", "b", "x", "c"], 0.75),
    ("contains_all", "12 34", ["12", "34"], 1.0),
    ("word_in", '{"k": "6ba-77"}', "6ba-77", 1.0),
    ("word_in", "6ba-771", "6ba-77", 0.0),
    ("yes_no", "Well, no. Yes!", "no", 1.0),
    ("yes_no", "yesterday", "yes", 0.0),
    ("yes_no", "I cannot tell", "no", 0.0),
    ("list_soft", "The counts are [2, 0, 3].", ["2", "1", "3"], 2 / 3),
    ("list_soft", "[2]", ["2", "0"], 0.5),
    ("list_soft", "2, 0", "[2, 0]", 1.0),
    ("list_soft", "two of them and no more", ["2", "0"], 0.0),
    ("list_soft", '["red", "Blue"]', ["red", "blue"], 1.0),
    ("list_exact", "[2, 0]", ["2", "0"], 1.0),
    ("list_exact", "[2, 0, 0]", ["2", "0"], 0.0),
    ("list_start", "1, 4, 9, 16", ["1", "4", "8", "16"], 0.5),
    ("list_start", "[8, 5, 7]", ["8", "5", "7"], 1.0),
    ("index_triplet", "image 3, row 1, column 2", "3,1,2", 1.0),
    ("index_triplet", "3,1,1", "3,1,2", 0.0),
    ("index_triplet", "-1", "-1", 1.0),
    ("index_triplet", "1,1,1", "-1", 0.0),
    ("index_only", "3,1,1", "3,1,2", 1.0),
    ("index_only", "2,1,2", "3,1,2", 0.0),
    ("numbers_share", "Paragraph 12 or 3", "Paragraph 12", 0.5),
    ("numbers_share", "17", "17", 1.0),
    ("numbers_share", "some", "17", 0.0),
    ("anls", "Hello  World", "hello world", 1.0),
    ("anls", "helo", "hello", 0.8),
    ("anls", "abc", "xyzw", 0.0),
    ("anls", "ab12", "abcd", 0.5),  # one half still counts
    ("anls", "12.5", ["$ 12.50", "12.50"], 0.8),
    ("relaxed", "105", "100", 1.0),
    ("relaxed", "105.1", "100", 0.0),
    ("relaxed", "-95", "-100", 1.0),
    ("relaxed", "0.1", "0", 0.0),
    ("relaxed", "0.0", "0", 1.0),
    ("relaxed", "40%", "0.4", 1.0),
    ("relaxed", "1,020", "1000", 1.0),
    ("relaxed", "Blue", "blue", 1.0),
    ("relaxed", "14", "blue", 0.0),
    ("vqa_soft", "cat", TEN, 1.0),
    ("vqa_soft", "dog", TEN, (2 * 1 / 3 + 8 * 2 / 3) / 10),
    ("vqa_soft", "2 cats", TEN, (9 * 1 / 3) / 10),
    ("vqa_soft", "fish", TEN, 0.0),
    ("vqa_soft", "Don't know!", ["dont know"] * 10, 1.0),
    ("vqa_soft", "1,000.", ["1000"] * 10, 1.0),
    ("qa_f1", "the Green lamp", ["green glass", "a lamp"], 2 / 3),
    ("qa_f1", "an apple.", "apple", 1.0),
    ("qa_f1_line", "apple\nQuestion: next?", "apple", 1.0),
    ("qa_f1_line", "pear\napple", "apple", 0.0),
    ("qa_f1_zh", "\u7eff\u8272\u3002", "\u7eff\u8272\u73bb\u7483", 2 / 3),
    ("rouge_l", "the cat sat on the mat", "a cat on a mat", 2 * 3 / 11),
    ("rouge_l_line", "\na b\nc d", "a b", 1.0),
    ("rouge_l_line", "c d\na b", "a b", 0.0),
    ("rouge_l_zh", "\u4e00\u4e8c\u4e09", "\u4e00\u4e09", 0.8),
    ("rouge_lsum", "c d\na b", "a b\nc d", 1.0),  # lines may come in another order
    ("rouge_lsum", "a a a", "a b", 2 * 1 / 5),  # a word counts once
    ("code_similarity", "```python\n# a line\nreturn x", "return x", 1.0),
    ("code_similarity", "return y", "return x", 0.88),
    ("numeric", "6 + 1 = 7. The answer is 1,200.", "1200", 1.0),
    ("numeric", "so\n#### $12.50 then 3", "12.5", 1.0),
    ("numeric", "-3", "3", 0.0),
    ("first_number", "05417 is it, not 1", "05417", 1.0),
    ("first_number", "5417", "05417", 0.0),
    ("first_number", "7.9 or so", "7", 1.0),
    ("first_number", "2.5", "2.50", 1.0),
    ("last_integer", "The value is `-7`.", "-7", 1.0),
    ("last_integer", "-7 or 8", "-7", 0.0),
    ("last_integer", "The value is 007.", "7", 1.0),
    ("last_integer", "The value is unknown", "7", 0.0),
    ("short_answer", "Adding up.\nIt is 3.504", "3.50", 1.0),
    ("short_answer", "It is 3.50\nNo, 4.", "3.50", 0.0),
    ("short_answer", "The answer is Both Sides.", "both sides", 1.0),
    ("abstention", "You never mentioned a boat.", "...", 1.0),
    ("abstention", "I don't have enough information.", "...", 1.0),
    ("abstention", "It is called Heron.", "...", 0.0),
]
CHOICES = [
    ("B", "B"),
    (" (b) ", "B"),
    ("**C**", "C"),
    ("B. a dark red box", "B"),
    ("The answer is C", "C"),
    ("I would say [D]", "D"),
    ("Answer: A", "A"),
    ("A dark red box it is", "B"),  # the shorter option stands inside the longer one
    ("a red box or blue", None),
    ("It is green", None),
    ("E", None),  # there are four options
    ("a box", None),
    ("", None),
    ("[A] is near, but I take B: it is darker", "B"),  # a letter with its mark goes before one in brackets,
    ("Option D, though [A] is near", "A"),  # one in brackets before one after a word,
    ("My answer is C, not a dark red box", "C"),  # one after a word before the text of an option
]
CODE = "def f(x):\n    return x + 1"
GOLD = {
    "abstention": ("I do not know that.", "unknown"),
    "classification": ("It is a place.", "place", ["place", "person"]),
    "classification_line": ("place", "place", ["place", "person"]),
    "choice_letter": ("B", "B", OPTIONS),
    "code_similarity": ("return x", "return x"),
    "contains_all": ("12, 34", ["12", "34"]),
    "function_match": (f"```python\n{CODE}\n```", CODE, [CODE]),
    "index_only": ("3,1,2", "3,1,2"),
    "index_triplet": ("3,1,2", "3,1,2"),
    "list_exact": ("[2, 0]", ["2", "0"]),
    "list_soft": ("[2, 0]", ["2", "0"]),
    "list_start": ("[2, 0]", ["2", "0"]),
    "math_equiv": (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    "vqa_soft": ("cat", ["cat"] * 10),
    "yes_no": ("Yes.", "yes"),
} | dict.fromkeys(
    (
        "anls", "contains_any", "exact", "first_number", "last_integer", "numbers_share", "numeric", "overlap", "qa_f1",
        "qa_f1_line", "qa_f1_zh", "relaxed", "rouge_l", "rouge_l_line", "rouge_l_zh", "rouge_lsum", "short_answer",
        "steps", "symbol", "token_in_split", "word_in",
    ), ("7", "7"),
)  # fmt: skip
VQA = [
    ("A red, white and blue flag", "red white and blue flag"),
    ("The cat\non  an\tapple", "cat on apple"),
    ("black/white", "black white"),  # a mark between words is a space
    ("well-lit - yes", "welllit yes"),  # and nothing where it stands beside a space anywhere
    ("1,000", "1000"),
    ("1,000-2,000", "10002000"),  # or where a comma stands between digits
    ("(left)", "left"),
    ("3.5", "3.5"),
    ("12:30 p.m.", "12:30 pm"),
    ("None", "0"),
    ("Two dogs", "2 dogs"),
    ("ten", "10"),
    ("twelve", "twelve"),
    ("$5", "$5"),
    ("Don't", "dont"),
    ("who's", "whos"),
    ("could've", "couldve"),
    ("it's", "it's"),  # "its" is another word,
    ("we're", "we're"),
    ("dog's", "dog's"),  # and "dogs" too
    ("the", ""),
]


@pytest.mark.parametrize(("name", "prediction", "answer", "score"), TABLE)
def test_scores_are_those_computed_by_hand(name, prediction, answer, score):
    assert SCORERS[name](prediction, answer) == pytest.approx(score)


def test_every_scorer_gives_one_for_what_is_right():
    assert {name: SCORERS[name](*gold) for name, gold in GOLD.items()} == dict.fromkeys(SCORERS, 1.0)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize(("prediction", "answer"), [(7, "7"), (None, "7"), ("7", 7), ("7", None)])
def test_what_is_no_text_is_refused_and_never_scored(name, prediction, answer):
    with pytest.raises(TypeError):
        SCORERS[name](prediction, answer)


@pytest.mark.parametrize(("text", "expected"), VQA)
def test_answers_about_pictures_are_normalised_as_published(text, expected):
    assert vqa_norm(text) == expected


@pytest.mark.parametrize(("prediction", "letter"), CHOICES)
def test_a_letter_is_read_or_wrong_but_never_guessed(prediction, letter):
    assert chosen_letter(prediction, OPTIONS) == letter
    assert SCORERS["choice_letter"](prediction, letter or "A", OPTIONS) == float(letter is not None)
    assert readable("choice_letter", prediction, OPTIONS) is (letter is not None)


def test_options_without_texts_are_the_first_ten_letters():
    assert [chosen_letter(said) for said in ("J", "K")] == ["J", None]
    assert readable("yes_no", "perhaps") is False
    assert readable("exact", "perhaps") is None
    assert readable("math_equiv", "\\boxed{1}") is True


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("place name", "place name", 1.0),
        ("place or person", "place", 0.5),
        ("person", "place", 0.0),
        ("", "place", 0.0),
    ],
)
def test_classes_named_beside_the_right_one_cost(prediction, answer, score):
    classes = ["place", "place name", "person"]
    assert SCORERS["classification"](prediction, answer, classes) == score
    assert SCORERS["classification_line"](f"\n{prediction}\nperson", answer, classes) == score


def test_a_function_has_to_be_nearer_to_the_right_one_than_to_any_other():
    body = "def f(x):\n    y = x * 2\n    total = y + 3 - x\n    return total if total > 0 else {}"
    right, other = body.format("None"), body.format("False")
    score = SCORERS["function_match"]
    assert score(f"Here:\n```python\n{right}\n```", right, [right, other]) == 1.0
    assert score(other, right, [right, other]) == 0.0
    assert score(other, right, [right]) == 1.0  # above 0.8 alike, and no other is nearer
    assert score("def g(): pass", right, [right, other]) == 0.0


@pytest.mark.parametrize("name", SCORERS)
def test_nothing_said_is_wrong(name):
    assert SCORERS[name]("", "3") == SCORERS[name]("  \n", ["3", "4"]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Seven\n of   NINE. ", "seven of nine"),
        ("\uff17", "7"),
        ("7.", "7"),
        ("7.5", "7.5"),
        ("...", ".."),
        ("", ""),
    ],
)
def test_norm_folds_case_width_space_and_one_full_stop(text, expected):
    assert norm(text) == expected


def test_edits_are_counted():
    assert [edits(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("same", "same"))] == [3, 3, 0]
