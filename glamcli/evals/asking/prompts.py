"""From questions to the exact texts a model sees: demonstrations, their draw, trimming.

The rules, in one place:

- demonstrations are whole questions with their right answer, joined by the task's separator, behind
  the task's header;
- they are drawn by a hash of (seed, task, item), so the draw does not depend on the order of the
  items or on a limit, and k shots begin with the same ones as k-1 shots; the item itself, under
  whatever name it is in the pool and however its blanks and capitals are written, is passed over;
- when window tokens are not enough, demonstrations are dropped whole, the farthest from the
  question (the first in the prompt) first; if the question alone is too long, `tokens.py` cuts its
  beginning.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glamcli.errors import DataError
from glamcli.evals.asking.question import Question, ask
from glamcli.evals.tasks.items import Item
from glamcli.evals.tasks.schema import Task


class Pool(Sequence[Question]):
    """Demonstrations, each read when it is drawn: a training set has far more than are shown."""

    def __init__(self, task: Task, items: Sequence[Item]):
        self._task = task
        self._items = items
        self._read: dict[int, Question] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._read:
            self._read[index] = ask(self._task, self._items[index], shown=True)
        return self._read[index]


@dataclass(frozen=True)
class Prompt:
    """A question behind its demonstrations."""

    question: Question
    contexts: tuple[str, ...]
    """complete contexts, demonstrations included; one per option."""
    shots: int
    """demonstrations that fitted."""


def draw(
    task: Task, task_name: str, asked: Question, pool: Sequence[Question], shots: int, seed: int
) -> list[Question]:
    """Demonstrations for one question, in prompt order.

    Raises:
        DataError: the pool has fewer demonstrations than asked for.
    """
    who = asked.key if task.shots.draw == "per_item" else "every item"
    order = _distinct(len(pool), f"{seed}/{task_name}/{who}")
    chosen: list[Question] = []
    while len(chosen) < shots:
        index = next(order, None)
        if index is None:
            raise DataError(
                f"task `{task_name}` has {len(chosen)} demonstrations for {asked.place},"
                f" and {shots} shots were asked for"
            )
        candidate = pool[index]
        if not _same(asked, candidate):
            chosen.append(candidate)
    return chosen


def _same(asked: Question, other: Question) -> bool:
    """Whether showing `other` would show the item itself (also under another id or order)."""
    if asked.key == other.key:
        return True
    if _plain(asked.contexts) != _plain(other.contexts):
        return False
    return asked.gold is None or set(_plain(asked.continuations)) == set(
        _plain(other.continuations)
    )


def _plain(texts: Sequence[str]) -> list[str]:
    """Texts in which case and white space do not count."""
    return [" ".join(text.lower().split()) for text in texts]


def _distinct(count: int, seed: str) -> Iterator[int]:
    """0..count-1 in an order drawn from the seed, one by one (Fisher and Yates)."""
    rng = random.Random(hashlib.sha256(seed.encode()).digest())
    moved: dict[int, int] = {}
    for first in range(count):
        other = rng.randrange(first, count)
        yield moved.get(other, other)
        moved[other] = moved.get(first, first)


def assemble(
    task: Task,
    asked: Question,
    shots: Sequence[Question],
    fits: Callable[[str], bool],
) -> Prompt:
    """The question behind as many demonstrations as fit.

    `fits` is asked about whole texts (context and longest continuation); it must be monotone.
    """
    told = [shot.demonstration(task.delimiter) for shot in shots]
    endings = asked.continuations or ("",) * len(asked.contexts)

    def contexts(first: int) -> tuple[str, ...]:
        joined = task.header + "".join(text + task.shots.separator for text in told[first:])
        return tuple(joined + context for context in asked.contexts)

    def whole_fits(first: int) -> bool:
        texts = {c + e for c, e in zip(contexts(first), endings, strict=True)}
        return all(fits(text) for text in texts)

    low, high = 0, len(told)  # the smallest `first` that fits; all dropped is always accepted
    if not told or whole_fits(0):
        high = 0
    while low < high:
        middle = (low + high) // 2
        if whole_fits(middle):
            high = middle
        else:
            low = middle + 1
    return Prompt(asked, contexts(high), len(told) - high)
