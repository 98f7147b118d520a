"""Free answers: words in common, the longest common subsequence, and how alike two lines of code are."""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from retention.tasks.scorers.text import lcs


def _words(text: str) -> list[str]:
    """Lower case, no punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _characters(text: str) -> list[str]:
    """Lower case, no punctuation of any script, no white space."""
    return [c for c in text.lower() if not c.isspace() and unicodedata.category(c)[0] not in "PS"]


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of words, punctuation and articles aside (SQuAD, LongBench)."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of characters, for Chinese (InfiniteBench; LongBench cuts words with jieba first)."""
    return _f1(_characters(prediction), _characters(answer))


def _rouge(said: Sequence[str], wanted: Sequence[str]) -> float:
    return 2 * lcs(said, wanted) / (len(said) + len(wanted)) if said and wanted else 0.0


def _tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F1 of words (Lin, 2004), the whole text as one sequence, no stemming."""
    return _rouge(_tokens(prediction), _tokens(answer))


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L F1 of characters, for Chinese (LongBench cuts words with jieba first)."""
    return _rouge(_characters(prediction), _characters(answer))


def rouge_lsum(prediction: str, answer: str) -> float:
    """ROUGE-Lsum F1: lines of the answer against all lines of the prediction, each word counted once."""
    said, wanted = ([_tokens(line) for line in text.split("\n")] for text in (prediction, answer))
    left, right = Counter(t for line in said for t in line), Counter(t for line in wanted for t in line)
    hits = 0
    for line in wanted:
        found = {place for other in said for place in _common_places(line, other)}
        for place in sorted(found):
            if left[line[place]] > 0 and right[line[place]] > 0:
                left[line[place]] -= 1
                right[line[place]] -= 1
                hits += 1
    total = sum(map(len, said)) + sum(map(len, wanted))
    return 2 * hits / total if total else 0.0


def _common_places(line: Sequence[str], other: Sequence[str]) -> list[int]:
    """Places of a longest common subsequence in `line`."""
    table = [[0] * (len(other) + 1)]
    for word in line:
        above, row = table[-1], [0]
        for j, that in enumerate(other):
            row.append(above[j] + 1 if word == that else max(above[j + 1], row[j]))
        table.append(row)
    places, i, j = [], len(line), len(other)
    while i and j:
        if line[i - 1] == other[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        elif table[i - 1][j] >= table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return places


def code_similarity(prediction: str, answer: str) -> float:
    """Likeness of the first line that is code to the reference line, 2 x common / both lengths (LongBench)."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(_rouge(line, answer), 2)


def function_match(prediction: str, answer: str, choices: Sequence[str] | None = None) -> float:
    """1 when the function repeated is at least 0.8 like the right one and less like any other (RepoQA of SCBench)."""
    block = re.search(r"```[\w+#-]*\n(.*?)(?:```|$)", prediction, re.DOTALL)
    said = (block[1] if block else prediction).split()
    others = [_bleu(said, other.split()) for other in choices or [] if other != answer]
    own = _bleu(said, answer.split())
    return float(own >= 0.8 and own >= max(others, default=0.0))


def _bleu(said: Sequence[str], wanted: Sequence[str], longest: int = 4) -> float:
    """BLEU-4 of one sequence, missing lengths smoothed by the fourth way of Chen and Cherry (2014)."""
    product, missed = 1.0, 0
    for n in range(1, longest + 1):
        grams = [Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (said, wanted)]
        matched: float = sum((grams[0] & grams[1]).values())
        if matched == 0:
            if n == 1 or len(said) < 2:
                return 0.0
            missed += 1
            matched = math.log(len(said)) / (5 * 2**missed)
        product *= matched / max(1, sum(grams[0].values()))
    return min(1.0, math.exp(1 - len(wanted) / len(said))) * product ** (1 / longest)
