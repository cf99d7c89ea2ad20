"""Items of tasks that stand in the training text: overlap of n-grams of words.

The rule follows GPT-3 (appendix C), whose check GLaM repeats. An item is its question with the
right answer, as asked without demonstrations. Words are runs of letters and digits, lower-cased. A
task's n is the 5th percentile of its items' numbers of words, but 8 at least and 13 at most. An
item is dirty when any of its n-grams stands in a training document; one of 8 to n words is looked
for whole, and one of fewer words is not judged.

Words become 64-bit numbers and n-grams polynomials of them, so memory holds the items' n-grams
(8 bytes each) and one piece of training text; two different n-grams are taken for the same about
once in 10^19 / (n-grams of the items x words of the training text) cases.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glamcli.data.rows import Rows
from glamcli.evals.results.scores import Results
from glamcli.evals.scoring.metrics import total_value
from glamcli.evals.tasks.schema import Task

MIN_WORDS, MAX_WORDS = 8, 13
SHORT_PERCENTILE = 5
_WORD = re.compile(r"[^\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Words as they are compared."""
    return _WORD.findall(text.lower())


def gram_words(lengths: Sequence[int]) -> int:
    """A task's n, from the numbers of words of its items."""
    return int(np.clip(np.percentile(lengths, SHORT_PERCENTILE), MIN_WORDS, MAX_WORDS))


class Grams:
    """The n-grams that are looked for, of all items, and where they are found in texts."""

    def __init__(self, wanted: Iterable[Sequence[str]]):
        """`wanted`: every n-gram as its words."""
        self._numbers: dict[str, int] = {}
        by_length: dict[int, set[int]] = {}
        for gram in wanted:
            by_length.setdefault(len(gram), set()).add(self._value(gram))
        self._known = {n: np.array(sorted(by_length[n]), np.uint64) for n in sorted(by_length)}
        ends = np.cumsum([0, *(len(known) for known in self._known.values())])
        self._starts = dict(zip(self._known, ends.tolist(), strict=False))
        self.count = int(ends[-1])

    def index(self, gram: Sequence[str]) -> int:
        """The number of one of the n-grams."""
        known = self._known[len(gram)]
        return self._starts[len(gram)] + int(np.searchsorted(known, np.uint64(self._value(gram))))

    def found(self, texts: Iterable[str]) -> np.ndarray:
        """Numbers of the n-grams that stand in the texts, each once, in order."""
        # A number of 0 is a word of no item: no n-gram goes on over it, nor over the end of a text.
        numbers = [
            number for text in texts for number in (*map(self._numbers.get, words(text)), None)
        ]
        h = np.array([number or 0 for number in numbers], np.uint64)
        strange = np.concatenate([[0], np.cumsum(h == 0)])
        sums = np.zeros(len(h), np.uint64)
        hits = [np.zeros(0, np.int64)]
        for n in range(1, max(self._known, default=0) + 1):
            size = len(h) - n + 1
            if size <= 0:
                break
            sums = sums[:size] * _BASE + h[n - 1 :]  # modulo 2^64
            if n in self._known:
                inside = strange[n:] == strange[:size]
                hits.append(self._matches(n, sums[inside]))
        return np.unique(np.concatenate(hits))

    def _matches(self, n: int, values: np.ndarray) -> np.ndarray:
        known = self._known[n]
        at = np.searchsorted(known, values)
        at[at == len(known)] = 0
        return self._starts[n] + at[known[at] == values]

    def _value(self, gram: Sequence[str]) -> int:
        value = 0
        for word in gram:
            if word not in self._numbers:
                digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
                self._numbers[word] = int.from_bytes(digest, "big") | 1
            value = (value * int(_BASE) + self._numbers[word]) % 2**64
        return value


@dataclass(frozen=True)
class Asked:
    """The items of a task as word sequences."""

    task: str
    keys: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    n: int

    def grams(self, item: int) -> list[tuple[str, ...]]:
        """What is looked for of one item: nothing if it is too short to be judged."""
        text = self.texts[item]
        if len(text) < MIN_WORDS:
            return []
        n = min(self.n, len(text))
        return [text[start : start + n] for start in range(len(text) - n + 1)]


@dataclass(frozen=True)
class Overlap:
    """What of a task stands in the training text."""

    task: str
    n: int
    num_items: int
    num_judged: int
    dirty: tuple[str, ...]
    """keys of the dirty items"""
    by_source: Mapping[str, int]
    """dirty items by the source that holds something of them"""

    @property
    def dirty_frac(self) -> float:
        """Share of dirty items among those that were judged."""
        return len(self.dirty) / max(self.num_judged, 1)


@dataclass(frozen=True)
class Split:
    """A score on all items, on clean and on dirty ones; None where there are none."""

    task: str
    setting: str
    metric: str
    all: float
    clean: float | None
    dirty: float | None
    num_clean: int
    num_dirty: int


def asked(task: str, keys: Sequence[str], texts: Sequence[str]) -> Asked:
    """A task's items, given by their keys and full texts."""
    split = tuple(tuple(words(text)) for text in texts)
    return Asked(task, tuple(keys), split, gram_words([len(each) for each in split]))


def overlaps(tasks: Sequence[Asked], grams: Grams, hits: Mapping[str, np.ndarray]) -> list[Overlap]:
    """Every task's dirty items; `hits` says per source which n-grams it holds (booleans)."""
    anywhere = np.zeros(grams.count, bool)
    for each in hits.values():
        anywhere |= each
    found = []
    for task in tasks:
        by_source = dict.fromkeys(hits, 0)
        dirty, judged = [], 0
        for item, key in enumerate(task.keys):
            indices = [grams.index(gram) for gram in task.grams(item)]
            judged += bool(indices)
            if anywhere[indices].any():
                dirty.append(key)
                for source, held in hits.items():
                    by_source[source] += bool(held[indices].any())
        overlap = Overlap(task.task, task.n, len(task.keys), judged, tuple(dirty), by_source)
        found.append(overlap)
    return found


def splits(
    tasks: Sequence[Asked],
    found: Sequence[Overlap],
    results: Results,
    items: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
) -> list[Split]:
    """Scores on the clean and the dirty items, by each task's first metric.

    Scores of items that were not looked for are left out.
    """
    dirty = {each.task: set(each.dirty) for each in found}
    looked_for = {each.task: set(each.keys) for each in tasks}
    told = []
    for score in results.scores:
        records = items.get((score.task, score.setting), ())
        if not records or not {each["key"] for each in records} <= looked_for.get(
            score.task, set()
        ):
            continue
        metric = score.measured[0].metric
        parts = [
            [each for each in records if (each["key"] in dirty[score.task]) is wanted]
            for wanted in (False, True)
        ]
        clean, unclean = (total_value(metric, part) if part else None for part in parts)
        whole = score.measured[0].value
        told.append(
            Split(score.task, score.setting, metric, whole, clean, unclean, *map(len, parts))
        )
    return told


def full_text(task: Task, question: Any) -> str:
    """An item's question with its right answer."""
    return question.demonstration(task.delimiter)


def row_documents(
    rows: Rows, start: int, end: int, bos_id: int, is_joined: bool
) -> Iterator[list[int]]:
    """Token ids of the documents that begin in rows `start` to `end`, put together again.

    `is_joined`: documents go on in the next row (packing `fill`); else each piece is by itself.
    """
    document: list[int] | None = None
    for number in range(start, len(rows)):
        row = rows[number]
        for segment in range(1, int(row["segments"].max()) + 1):
            ids = row["tokens"][row["segments"] == segment].tolist()
            begins = ids[0] == bos_id
            if begins or not is_joined:
                if document is not None:
                    yield document
                if number >= end:
                    return
                document = ids[1:] if begins else ids
            elif document is not None:  # else it began before `start`
                document += ids
        if number >= end and document is None:
            return
    if document is not None:
        yield document
