"""The score of a task from its items: means and metrics of the whole, errors, baselines.

Every metric is a function of sums over units (items, or the answers of one question), so its
value, its standard error and its bootstrap interval come from one table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glamcli.evals.scoring.text_metrics import Answer, normalized, text_metric

RESAMPLES = 1000
CONFIDENCE = 0.95
WITH_INTERVAL = ("f1", "f1a", "macro_f1", "perplexity")
"""Metrics whose items are no coin tosses, and those that are no mean of items."""

Record = Mapping[str, Any]
Values = Callable[[np.ndarray], np.ndarray]
"""Metric values [...] of column sums [..., columns]."""


@dataclass(frozen=True)
class Total:
    """One metric over all items."""

    value: float
    stderr: float | None
    """of a mean: from the sample standard deviation; of other metrics: that of the resamples."""
    interval: tuple[float, float] | None = None
    """95 % bootstrap: percentiles of 1,000 seeded resamples of the units."""


def total(name: str, items: Sequence[Record], seed: int = 0) -> Total:
    """A metric over the records of a task's items.

    A record holds the item's value of each metric that is a mean, by name. Besides, `f1a` and
    `question_em` read `gold`, `chosen` and `group`, `macro_f1` reads `wanted_class` and
    `found_class`, `perplexity` reads `answer_nats`.
    """
    table, values = _TABLES.get(name, _mean)(name, items)
    value = float(values(table.sum(axis=0)))
    is_mean = name not in _TABLES or name == "question_em"
    stderr = mean_and_error(values(table).tolist())[1] if is_mean else None
    if name not in WITH_INTERVAL or len(table) < 2:
        return Total(value, stderr)
    resampled = _resampled(table, values, seed)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail]).tolist()
    return Total(value, stderr if is_mean else float(resampled.std(ddof=1)), (low, high))


def _resampled(table: np.ndarray, values: Values, seed: int) -> np.ndarray:
    """The metric of as many units drawn with replacement, again and again."""
    rng = np.random.default_rng(seed)
    count = len(table)
    sums = [table[rng.integers(0, count, count)].sum(axis=0) for _ in range(RESAMPLES)]
    return values(np.array(sums))


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _mean(name: str, items: Sequence[Record]) -> tuple[np.ndarray, Values]:
    return np.array([(float(item[name]), 1.0) for item in items]), _ratio


def _question_em(name: str, items: Sequence[Record]) -> tuple[np.ndarray, Values]:
    """Share of questions whose answers are all judged rightly (MultiRC's exact match)."""
    rows = [
        (float(all(item["chosen"] == item["gold"] for item in group)), 1.0)
        for group in _groups(items)
    ]
    return np.array(rows), _ratio


def _f1a(name: str, items: Sequence[Record]) -> tuple[np.ndarray, Values]:
    """F1 of the answers judged true (option 1), over all answers of all questions (MultiRC)."""
    rows = [
        np.sum([_counts(item["chosen"] == 1, item["gold"] == 1) for item in group], axis=0)
        for group in _groups(items)
    ]
    return np.array(rows), _f1


def _groups(items: Sequence[Record]) -> list[list[Record]]:
    found: dict[Any, list[Record]] = {}
    for item in items:
        found.setdefault(item["group"], []).append(item)
    return list(found.values())


def _macro_f1(name: str, items: Sequence[Record]) -> tuple[np.ndarray, Values]:
    """Unweighted mean of the F1 of every class that is wanted or found (CB)."""
    classes = sorted({item[key] for item in items for key in ("wanted_class", "found_class")})
    rows = [
        [_counts(item["found_class"] == each, item["wanted_class"] == each) for each in classes]
        for item in items
    ]

    def values(sums: np.ndarray) -> np.ndarray:
        return _f1(sums.reshape(*sums.shape[:-1], len(classes), 3)).mean(axis=-1)

    return np.array(rows).reshape(len(items), -1), values


def _perplexity(name: str, items: Sequence[Record]) -> tuple[np.ndarray, Values]:
    """exp of the mean negative log-likelihood of an answer (LAMBADA: of the last word)."""
    table = np.array([(float(item["answer_nats"]), 1.0) for item in items])
    return table, lambda sums: np.exp(-_ratio(sums))


def _counts(found: bool, wanted: bool) -> tuple[float, float, float]:
    """Found rightly, found, wanted: what F1 sums."""
    return float(found and wanted), float(found), float(wanted)


def _f1(sums: np.ndarray) -> np.ndarray:
    denominator = sums[..., 1] + sums[..., 2]
    return 2 * sums[..., 0] / np.where(denominator > 0, denominator, 1.0)


_TABLES: dict[str, Callable[[str, Sequence[Record]], tuple[np.ndarray, Values]]] = {
    "f1a": _f1a,
    "question_em": _question_em,
    "macro_f1": _macro_f1,
    "perplexity": _perplexity,
}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, from the sample standard deviation; None for one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def choice_baselines(
    options: Sequence[Sequence[str]], accepted: Sequence[Sequence[int]]
) -> dict[str, float | None]:
    """Accuracies without a model.

    `random`: an option drawn evenly; `position`: always the position that is right most often;
    `majority`: always the option text that is right most often, None when options differ by item.
    """
    count = len(accepted)
    fixed = len({tuple(sorted(each)) for each in options}) == 1
    positions = Counter(index for each in accepted for index in each)
    texts = Counter(
        text
        for each, right in zip(options, accepted, strict=True)
        for text in {each[index] for index in right}
    )
    pairs = zip(options, accepted, strict=True)
    return {
        "random": math.fsum(len(right) / len(each) for each, right in pairs) / count,
        "position": positions.most_common(1)[0][1] / count,
        "majority": texts.most_common(1)[0][1] / count if fixed else None,
    }


def text_baselines(
    answers: Sequence[Sequence[Answer]], name: str, how: str, **rules: Any
) -> dict[str, float | None]:
    """Score of always giving the answer that most items accept; chance has no meaning here.

    Of answers that equally many accept, the first by alphabet. `rules` are those of `text_metric`.
    """
    counts = Counter(
        text
        for each in answers
        for text in {normalized(a if isinstance(a, str) else " ".join(a), how) for a in each}
    )
    best = min(counts, key=lambda text: (-counts[text], text))
    values = [text_metric(name, best, each, how, **rules) for each in answers]
    return {"random": None, "position": None, "majority": math.fsum(values) / len(values)}
