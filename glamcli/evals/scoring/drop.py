"""DROP's answers: bags of words in which numbers have to agree, several spans matched one to one.

An answer is a tuple of spans: one number, one date, or the spans that only together are right
(Dua et al., arXiv 1903.00161; its official script rounds each item's F1 to two places, and so
does this).
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def drop_spans(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """The spans of an answer as DROP's files hold it: `number`, `spans` or `date`.

    Empty when the annotator gave none.
    """
    number, listed = answer.get("number"), answer.get("spans")
    if number not in (None, ""):
        return (str(number),)
    if listed:
        return tuple(str(each) for each in listed)
    date = answer.get("date") or {}
    text = " ".join(str(date.get(part) or "") for part in ("day", "month", "year"))
    return (" ".join(text.split()),) if text.strip() else ()


def normalized_drop(text: str) -> str:
    """Lower-cased words without punctuation and articles; hyphens separate words, a number keeps
    its point and becomes a float."""
    words = (_normalized_word(word) for word in re.split(" |-", text.lower()))
    return " ".join(word for word in words if word)


def _normalized_word(word: str) -> str:
    bare = word if _is_number(word) else word.translate(_PUNCTUATION)
    if _is_number(bare):
        return str(float(bare))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def drop_metric(
    name: str, prediction: str | tuple[str, ...], answers: Sequence[str | Sequence[str]]
) -> float:
    """Highest em or f1 over the accepted answers."""
    measure = {"em": _exact_match, "f1": _f1}[name]
    found, *accepted = (
        (each,) if isinstance(each, str) else tuple(each) for each in (prediction, *answers)
    )
    return max(measure(found, each) for each in accepted)


def _exact_match(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """1 when both have the same spans, in any order."""
    found, wanted = ([normalized_drop(each) for each in side] for side in (prediction, answer))
    return float(len(found) == len(wanted) and set(found) == set(wanted))


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Mean F1 of spans matched one to one so that it is highest; unmatched ones count as 0.

    Spans share nothing when the accepted one has numbers and none of them is in the other.
    """
    found, wanted = (
        [set(normalized_drop(each).split()) for each in side] for side in (prediction, answer)
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
