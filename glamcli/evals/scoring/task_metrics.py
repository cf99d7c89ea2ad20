"""Metrics over the records of a task's items, with standard errors and bootstrap intervals.

Every metric is a function of sums over units (items, or the answers of one question), so its
value, its standard error and its bootstrap interval come from one table. Where options tie
exactly, each of the k best counts 1/k.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

_RESAMPLES = 1000
_CONFIDENCE = 0.95
_WITH_INTERVAL = ("f1", "f1a", "macro_f1", "perplexity")
"""Metrics whose items are not just 0 or 1, and those that are not a mean over items."""

_Record = Mapping[str, Any]

UNLIKE_RECORDS = (AttributeError, LookupError, TypeError, ValueError, OverflowError)
"""What these functions raise for records, read from a file, that are not of the metric."""


class Total:
    """A metric over the records of a task's items; what is asked for is computed.

    A record holds the item's value of each metric that is a mean, by name. Besides, `f1a` and
    `question_em` read `gold`, `chosen`, `tied` and `group`; `macro_f1` reads `wanted_class`,
    `found_class`, `tied` and `classes`; `perplexity` reads `answer_nats`.
    """

    def __init__(self, name: str, items: Sequence[_Record], seed: int = 0):
        self._name = name
        self._seed = seed
        self._items = items
        self._table, self._values = _table(name, items)
        self.value = float(self._values(self._table.sum(axis=0)))

    @property
    def of_items(self) -> list[float]:
        """How well each item was done; for metrics of the whole, whether it was judged right."""
        return [_item_value(self._name, item) for item in self._items]

    @property
    def stderr(self) -> float | None:
        """Of a mean: from the sample standard deviation; of other metrics: of the resamples."""
        if self._name not in ("f1a", "macro_f1", "perplexity"):
            return _standard_error(self._values(self._table).tolist())
        return None if self._resampled is None else float(self._resampled.std(ddof=1))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % bootstrap: percentiles of 1,000 seeded resamples of the units."""
        if self._resampled is None:
            return None
        tail = 100 * (1 - _CONFIDENCE) / 2
        low, high = np.percentile(self._resampled, [tail, 100 - tail]).tolist()
        return low, high

    @cached_property
    def _resampled(self) -> np.ndarray | None:
        """The metric of every resample; None where it has no interval."""
        count = len(self._table)
        if self._name not in _WITH_INTERVAL or count < 2:
            return None
        rng = np.random.default_rng(self._seed)
        drawn = (self._table[rng.integers(0, count, count)] for _ in range(_RESAMPLES))
        return self._values(np.array([rows.sum(axis=0) for rows in drawn]))


def _item_value(name: str, item: _Record) -> float:
    if name == "perplexity":
        return float(item["answer_nats"])
    if name in item:
        return float(item[name])
    if name in ("f1a", "question_em"):
        return _shares(item).get(item["gold"], 0.0)
    return _class_shares(item).get(item["wanted_class"], 0.0)


def _shares(item: _Record) -> dict[int, float]:
    """How much each option counts as the chosen one: 1, or equal shares where several tie."""
    best = item.get("tied") or ([] if item["chosen"] is None else [item["chosen"]])
    return dict.fromkeys(best, 1 / max(len(best), 1))


def _class_shares(item: _Record) -> dict[str, float]:
    """The same by class: the text of an option, or of a free answer."""
    if not item.get("tied"):
        return {} if item["found_class"] is None else {item["found_class"]: 1.0}
    shares: dict[str, float] = {}
    for option, share in _shares(item).items():
        text = item["options"][option]["text"]
        shares[text] = shares.get(text, 0.0) + share
    return shares


def _table(
    name: str, items: Sequence[_Record]
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """What a metric sums over units [units, ...], and its values of such rows or sums of them."""
    if name == "macro_f1":
        # Unweighted mean of the F1 of every class (CB): those that the task knows, which the
        # records hold as `classes`, else those that items want.
        classes = items[0].get("classes") or sorted({item["wanted_class"] for item in items})
        found = [(_class_shares(item), item["wanted_class"]) for item in items]
        rows = [
            [_counts(shares.get(each, 0.0), wanted == each) for each in classes]
            for shares, wanted in found
        ]
        return np.array(rows), lambda sums: _f1(sums).mean(axis=-1)
    if name == "perplexity":
        # exp of the mean negative log-likelihood of an answer (LAMBADA: of the last word).
        rows = [(float(item["answer_nats"]), 1.0) for item in items]
        return np.array(rows), lambda sums: np.exp(-_ratio(sums))
    if name not in ("f1a", "question_em"):
        return np.array([(float(item[name]), 1.0) for item in items]), _ratio
    groups: dict[Any, list[_Record]] = {}
    for item in items:
        groups.setdefault(item["group"], []).append(item)
    if name == "f1a":
        # F1 of the answers judged true (option 1), over all answers of all questions (MultiRC).
        rows = [
            np.sum([_counts(_shares(each).get(1, 0.0), each["gold"] == 1) for each in some], axis=0)
            for some in groups.values()
        ]
        return np.array(rows), _f1
    # Share of questions whose answers are all judged correctly (MultiRC's exact match).
    right = [[_shares(each).get(each["gold"], 0.0) for each in some] for some in groups.values()]
    return np.array([(math.prod(each), 1.0) for each in right]), _ratio


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _counts(found: float, wanted: bool) -> tuple[float, float, float]:
    """Found correctly, found, wanted: what F1 sums."""
    return found * wanted, found, float(wanted)


def _f1(sums: np.ndarray) -> np.ndarray:
    denominator = sums[..., 1] + sums[..., 2]
    return 2 * sums[..., 0] / np.where(denominator > 0, denominator, 1.0)


def _standard_error(values: Sequence[float]) -> float | None:
    """Of a mean, from the sample standard deviation; None for one value."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return math.sqrt(variance / count)
