"""Items of tasks that occur in the training text: overlap of n-grams of words.

The rule follows GPT-3 (appendix C), whose check GLaM repeats. An item is its question with the
right answer, as asked without demonstrations. Words are runs of letters and digits, lower-cased. A
task's n is the 5th percentile of its items' numbers of words, but 8 at least and 13 at most. An
item is dirty when any of its n-grams occurs in a training document; one of 8 to n words is searched
for whole, and one of fewer words is not judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glamcli.errors import DataError, GlamError
from glamcli.evals.asking.prompts import TaskQuestions
from glamcli.evals.paper.ngrams import Grams, words
from glamcli.evals.results.scores import Results
from glamcli.evals.results.store import load_results, results_of_suite
from glamcli.evals.scoring.task_metrics import UNLIKE_RECORDS, Total
from glamcli.evals.tasks.items import Library
from glamcli.evals.tasks.suites import SuiteFile
from glamcli.progress import Progress

_MIN_WORDS, _MAX_WORDS = 8, 13
_SHORT_PERCENTILE = 5


@dataclass(frozen=True)
class _TaskWords:
    """The items of a task as word sequences."""

    task: str
    keys: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    n: int

    def grams(self, item: int) -> list[tuple[str, ...]]:
        """What is searched for of one item: nothing if it is too short to be judged."""
        text = self.texts[item]
        if len(text) < _MIN_WORDS:
            return []
        n = min(self.n, len(text))
        return [text[start : start + n] for start in range(len(text) - n + 1)]


@dataclass(frozen=True)
class Overlap:
    """What of a task occurs in the training text."""

    task: str
    n: int
    num_items: int
    num_judged: int
    dirty: tuple[str, ...]
    """keys of the dirty items"""
    by_source: Mapping[str, int]
    """dirty items by the source that holds something of them"""
    dirty_frac: float
    """share of dirty items among those that were judged"""


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


def find_overlaps(
    suite: SuiteFile,
    library: Library,
    limit: int | None,
    search: Callable[[Grams], Mapping[str, np.ndarray]],
    run: Path | None,
    progress: Progress,
) -> tuple[list[Overlap], list[Split], bool]:
    """The dirty ones of the first `limit` items of every task, the scores on clean and dirty items
    that a run folder has, and whether a task could not be read.

    `search` finds the n-grams of every source (booleans).

    Raises:
        DataError: no task can be read.
    """
    tasks, failed = _suite_words(suite, library, limit, progress)
    found = _overlaps(tasks, search)
    splits = [] if run is None else _stored_splits(run, suite, tasks, found, progress)
    return found, splits, failed


def _task_words(task: str, keys: Sequence[str], texts: Sequence[str]) -> _TaskWords:
    """A task's items, given by their keys and full texts."""
    split = tuple(tuple(words(text)) for text in texts)
    lengths = [len(each) for each in split]
    n = int(np.clip(np.percentile(lengths, _SHORT_PERCENTILE), _MIN_WORDS, _MAX_WORDS))
    return _TaskWords(task, tuple(keys), split, n)


def _suite_words(
    suite: SuiteFile, library: Library, limit: int | None, progress: Progress
) -> tuple[list[_TaskWords], bool]:
    """The first `limit` items of every task that can be read, and whether one could not."""
    found: list[_TaskWords] = []
    errors: list[GlamError] = []
    for file in suite.tasks:
        try:
            asked = TaskQuestions(file, library, limit).at(0)
        except GlamError as error:
            progress.warn(f"task `{file.name}` was not searched for: {error.what}")
            errors.append(error)
            continue
        texts = [each.demonstration(asked.task.delimiter) for each in asked.questions]
        found.append(_task_words(file.name, [each.key for each in asked.questions], texts))
    if not found:
        hint = errors[0].hint if errors else None
        raise DataError(f"no task of `{suite.name}` can be read", hint=hint)
    return found, bool(errors)


def _overlaps(
    tasks: Sequence[_TaskWords], search: Callable[[Grams], Mapping[str, np.ndarray]]
) -> list[Overlap]:
    """Every task's dirty items."""
    grams = Grams(
        gram for task in tasks for item in range(len(task.keys)) for gram in task.grams(item)
    )
    hits = search(grams)
    anywhere = np.logical_or.reduce([np.zeros(grams.count, bool), *hits.values()])
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
        counts = (task.n, len(task.keys), judged)
        frac = len(dirty) / max(judged, 1)
        found.append(Overlap(task.task, *counts, tuple(dirty), by_source, frac))
    return found


def _split_scores(
    tasks: Sequence[_TaskWords],
    found: Sequence[Overlap],
    results: Results,
) -> list[Split]:
    """Scores on the clean and the dirty items, by each task's first metric.

    Scores with items that were not searched for are omitted.
    """
    dirty = {each.task: set(each.dirty) for each in found}
    searched = {each.task: set(each.keys) for each in tasks}
    made = []
    for score in results.scores:
        keys = {each["key"] for each in score.items}
        if not keys or not keys <= searched.get(score.task, set()):
            continue
        metric = score.measured[0].metric
        parts = [
            [each for each in score.items if (each["key"] in dirty[score.task]) is wanted]
            for wanted in (False, True)
        ]
        clean, unclean = (Total(metric, part).value if part else None for part in parts)
        whole = score.measured[0].value
        made.append(
            Split(score.task, score.setting, metric, whole, clean, unclean, *map(len, parts))
        )
    return made


def _stored_splits(
    run: Path,
    suite: SuiteFile,
    tasks: Sequence[_TaskWords],
    found: Sequence[Overlap],
    progress: Progress,
) -> list[Split]:
    """`_split_scores` of the results that a run folder holds of the suite at its newest step.

    Where several results have a task at the same number of shots, the first one is taken.
    """
    made: dict[tuple[str, str], Split] = {}
    for path in results_of_suite(run, suite.name, suite.preset):
        try:
            splits = _split_scores(tasks, found, load_results(path, with_items=True))
        except (GlamError, *UNLIKE_RECORDS) as error:
            progress.warn(f"no scores on clean and dirty items of {path}: {error}")
            continue
        fresh = {(each.task, each.setting): each for each in splits}
        if fresh.keys() - made.keys():
            progress.say(f"scores are those of {path}")
        made = made | fresh | made
    return list(made.values())
