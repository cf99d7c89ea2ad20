"""Comparing one text with the accepted ones, as each dataset's official script does.

`normalize` of a task names the family: which characters count, and what one answer is. Metrics of
whole tasks are in `task_metrics.py`.

An answer of DROP is a tuple of spans, matched one to one: one number, one date, or the spans that
only together are right (Dua et al., arXiv 1903.00161). Spans are sets of words in which numbers
have to agree, and each item's F1 is rounded to two places, as in the official script.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

Answer = str | tuple[str, ...]
"""An accepted answer: a text, or for DROP the texts that only together are the answer."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’“”")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# TriviaQA's script leaves a blank where a mark was: "A-ha" is two words, as are snake_case names.
_MARKS_AS_BLANKS = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalized(text: str, how: str) -> str:
    """Text as it is compared.

    `exact`: without outer blanks. `words`: lower-cased, without punctuation. `squad` (SQuAD v2's
    and CoQA's script) and `squad_v1` (SQuAD v1.1's, ReCoRD's and QuAC's): lower-cased, without
    ASCII punctuation, then without articles. `triviaqa`: the same, but punctuation and underscores
    become blanks. `drop`: see `_normalized_drop`.
    """
    if how == "exact":
        return text.strip()
    if how == "words":
        return " ".join(text.lower().translate(_PUNCTUATION).split())
    if how == "drop":
        return _normalized_drop(text)
    marks = _MARKS_AS_BLANKS if how == "triviaqa" else _ASCII_PUNCTUATION
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(marks)).split())


def _exact_match(prediction: str, answers: Sequence[str], how: str = "squad") -> float:
    """1 when the prediction equals one of the accepted answers, else 0."""
    found = normalized(prediction, how)
    return float(any(found == normalized(answer, how) for answer in answers))


def _token_f1(prediction: str, answers: Sequence[str], how: str = "squad") -> float:
    """Best overlap, as F1 over bags of words, with one of the accepted answers (SQuAD).

    When neither side has words left, it is 1 (SQuAD v2), or for `squad_v1` 0: no word is common.
    """
    found = normalized(prediction, how)
    return max(_f1(found, normalized(answer, how), how) for answer in answers)


def _f1(prediction: str, answer: str, how: str) -> float:
    found, wanted = prediction.split(), answer.split()
    if not found or not wanted:
        return float(found == wanted and how != "squad_v1")
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def _without_each(answers: Sequence[str]) -> list[Sequence[str]]:
    """The others of each of several references."""
    return [[*answers[:index], *answers[index + 1 :]] for index in range(len(answers))]


def agreement(answers: Sequence[str], how: str = "squad") -> float:
    """Mean F1 of each reference against the others: human performance (QuAC)."""
    if len(answers) == 1:
        return 1.0
    pairs = zip(answers, _without_each(answers), strict=True)
    return sum(_token_f1(answer, rest, how) for answer, rest in pairs) / len(answers)


def text_metric(
    name: str,
    prediction: Answer,
    answers: Sequence[Answer],
    how: str,
    *,
    references: str = "best",
    no_answer: str | None = None,
) -> float:
    """One generated answer measured by em or f1.

    `references`: the `best` of all, or `leave_one_out`, the mean over all ways to leave out one of
    several (CoQA, QuAC: human scores are against the references of others). About `no_answer`
    nothing can be partly right. For `squad_v1` it has to match exactly (QuAC). Else a prediction
    of it is the empty text, as is an only accepted answer of it, and accepted answers in which no
    word is left count only if there are no others (SQuAD v2).
    """
    if how == "drop":
        return _drop_metric(name, prediction, answers)
    prediction, *texts = (
        " ".join(each) if isinstance(each, tuple) else each for each in (prediction, *answers)
    )
    measure = {"em": _exact_match, "f1": _token_f1}[name]
    if no_answer is not None and how == "squad_v1":
        if texts == [no_answer]:
            return float(prediction == no_answer)
    elif no_answer is not None:
        texts = [] if texts == [no_answer] else texts
        texts = [each for each in texts if normalized(each, how)] or [""]
        if normalized(prediction, how) == normalized(no_answer, how):
            prediction = ""
    if references == "leave_one_out" and len(texts) > 1:
        values = [measure(prediction, rest, how) for rest in _without_each(texts)]
        return sum(values) / len(values)
    return measure(prediction, texts, how)


def _normalized_drop(text: str) -> str:
    """Lower-cased words without punctuation and articles; hyphens separate words, a number keeps
    its point and becomes a float."""
    words = (_normalized_word(word) for word in re.split(" |-", text.lower()))
    return " ".join(word for word in words if word)


def _normalized_word(word: str) -> str:
    bare = word if _is_number(word) else word.translate(_ASCII_PUNCTUATION)
    if _is_number(bare):
        return str(float(bare))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _drop_metric(
    name: str, prediction: str | tuple[str, ...], answers: Sequence[str | Sequence[str]]
) -> float:
    """Highest em or f1 over the accepted answers."""
    measure = {"em": _same_spans, "f1": _span_f1}[name]
    found, *accepted = (
        (each,) if isinstance(each, str) else tuple(each) for each in (prediction, *answers)
    )
    return max(measure(found, each) for each in accepted)


def _same_spans(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """1 when both have the same spans, in any order."""
    found, wanted = ([_normalized_drop(each) for each in side] for side in (prediction, answer))
    return float(len(found) == len(wanted) and set(found) == set(wanted))


def _span_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Mean F1 of spans matched one to one so that it is highest; unmatched ones count as 0.

    Spans share nothing when the accepted one has numbers and none of them is in the other.
    """
    found, wanted = (
        [set(_normalized_drop(each).split()) for each in side] for side in (prediction, answer)
    )
    scores = [[_bag_f1(bag, gold) for bag in found] for gold in wanted]
    return round(_best_total(scores) / max(len(found), len(wanted)), 2)


def _bag_f1(found: set[str], wanted: set[str]) -> float:
    numbers = {word for word in wanted if _is_number(word)}
    if numbers and not numbers & found:
        return 0.0
    common = len(found & wanted)
    precision = common / len(found) if found else 1.0
    recall = common / len(wanted) if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _best_total(scores: list[list[float]]) -> float:
    """The largest sum of scores with one per row and column."""
    if min(len(scores), len(scores[0])) == 1:
        return max(max(row) for row in scores)
    from scipy.optimize import linear_sum_assignment  # slow to import, and rarely needed

    rows, columns = linear_sum_assignment(scores, maximize=True)
    return sum(scores[row][column] for row, column in zip(rows, columns, strict=True))
