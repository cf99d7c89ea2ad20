"""From questions to the exact texts a model sees: demonstrations, their draw, trimming.

The rules, in one place:

- demonstrations are whole questions with their right answer, joined by the task's separator, behind
  the task's header;
- they are drawn by a hash of (seed, task, item), so the draw does not depend on the order of the
  items or on a limit, and k shots begin with the same ones as k-1 shots; the item itself, also
  with another id, or other blanks and capitals, is passed over;
- when window tokens are not enough, demonstrations are dropped whole, the farthest from the
  question (the first in the prompt) first; if the question alone is too long, its beginning is cut
  (`scoring/requests.py`).
"""

import hashlib
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from glamcli.errors import DataError, RecipeError
from glamcli.evals.asking.question import Question, ask
from glamcli.evals.scoring.text_metrics import agreement
from glamcli.evals.tasks.items import Item, Library
from glamcli.evals.tasks.schema import Task
from glamcli.evals.tasks.suites import TaskFile


class _Pool(Sequence[Question]):
    """Demonstrations, each read when it is drawn: a training set has far more than are shown."""

    def __init__(self, task: Task, items: Sequence[Item]):
        self._items = items
        self._read = lru_cache(None)(lambda index: ask(task, items[index], shown=True))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._read(index)


@dataclass(frozen=True)
class Prompt:
    """A question behind its demonstrations."""

    question: Question
    contexts: tuple[str, ...]
    """complete contexts, demonstrations included; one per option."""
    shots: int
    """demonstrations that fitted."""


def _draw(
    task: Task, task_name: str, asked: Question, pool: Sequence[Question], shots: int, seed: int
) -> list[Question]:
    """Demonstrations for one question, in prompt order.

    Raises:
        DataError: the pool has fewer demonstrations than asked for.
    """
    who = asked.key if task.shots.draw == "per_item" else "every item"
    order = _distinct(len(pool), f"{seed}/{task_name}/{who}")
    others = (pool[index] for index in order)
    chosen = list(islice((each for each in others if not _same(asked, each)), shots))
    if len(chosen) < shots:
        raise DataError(
            f"task `{task_name}` has {len(chosen)} demonstrations for {asked.place},"
            f" and {shots} shots were asked for"
        )
    return chosen


def _same(asked: Question, other: Question) -> bool:
    """Whether showing `other` would show the item itself (also under another id or order)."""

    def plain(texts: Sequence[str]) -> list[str]:  # case and white space do not count
        return [" ".join(text.lower().split()) for text in texts]

    return asked.key == other.key or (
        plain(asked.contexts) == plain(other.contexts)
        and set(plain(asked.continuations)) == set(plain(other.continuations))
    )


def _distinct(count: int, seed: str) -> Iterator[int]:
    """0..count-1 in an order drawn from the seed, one by one (Fisher and Yates)."""
    rng = random.Random(hashlib.sha256(seed.encode()).digest())
    moved: dict[int, int] = {}
    for first in range(count):
        other = rng.randrange(first, count)
        yield moved.get(other, other)
        moved[other] = moved.get(first, first)


def _assemble(
    task: Task, asked: Question, shots: Sequence[Question], fits: Callable[[str], bool]
) -> Prompt:
    """The question behind as many demonstrations as fit.

    `fits` is called with whole texts (context and longest continuation); it must be monotone.
    """
    shown = [shot.demonstration(task.delimiter) for shot in shots]
    endings = asked.continuations or ("",) * len(asked.contexts)

    def contexts(first: int) -> tuple[str, ...]:
        joined = task.header + "".join(text + task.shots.separator for text in shown[first:])
        return tuple(joined + context for context in asked.contexts)

    def whole_fits(first: int) -> bool:
        texts = {c + e for c, e in zip(contexts(first), endings, strict=True)}
        return all(fits(text) for text in texts)

    # All dropped is always accepted.
    fits_all = not shown or whole_fits(0)
    first = 0 if fits_all else bisect_left(range(len(shown)), True, key=whole_fits)
    return Prompt(asked, contexts(first), len(shown) - first)


@dataclass(frozen=True)
class _Variant:
    """A task with its questions, as it is asked without or with demonstrations."""

    task: Task
    questions: list[Question]
    skipped: tuple[str, ...]
    """why items are not asked at all."""
    pool: _Pool | None
    """None without demonstrations."""


class TaskQuestions:
    """The questions of a task file; demonstrations are read when they are first asked for, so that
    a missing pool does not stop the zero-shot score."""

    def __init__(self, file: TaskFile, library: Library, limit: int | None):
        """Reads the items and asks the first `limit` of them without demonstrations.

        Raises:
            GlamError: the file or its items cannot be read.
        """
        self.file = file
        self._library = library
        self._limit = limit
        self.items = library.items(file.at(0), file.path)
        self._variant = lru_cache(self._make_variant)
        self.at(0)

    def at(self, shots: int) -> _Variant:
        """The task as it is asked behind this many demonstrations."""
        return self._variant(shots > 0)

    def _make_variant(self, with_shots: bool) -> _Variant:
        task = self.file.at(int(with_shots))
        pool = None
        if with_shots:
            pool = _Pool(task, self._library.pool(task, self.file.path, self.items))
        kept, skipped = [], []
        for each in (ask(task, item) for item in self.items[: self._limit]):
            least = task.min_agreement  # of QuAC's script
            if least and agreement(each.answers, task.normalize) < least:
                skipped.append(f"{each.place}: its references agree less than {least}")
            else:
                kept.append(each)
        if not kept:
            raise DataError(f"task `{self.file.name}`: every item was skipped")
        return _Variant(task, kept, tuple(skipped), pool)

    def num_shots(self, setting: int | str) -> int:
        """What a setting, a number or `few`, means for the task.

        Raises:
            RecipeError: `few`, and the task does not say how many.
        """
        if isinstance(setting, int):
            return setting
        few = self.file.at(1).shots.few
        if few is None:
            raise RecipeError(
                f"task `{self.file.name}` does not say what `few` means",
                hint="set `shots.few` in its file",
            )
        return few

    def prompt(
        self, question: Question, shots: int, seed: int, encode: Callable[[str], list[int]],
        window: int,
    ) -> Prompt:  # fmt: skip
        """The question behind as many of its demonstrations as fit into the window."""
        variant = self.at(shots)
        task, drawn = variant.task, []
        if variant.pool is not None:
            drawn = _draw(task, self.file.name, question, variant.pool, shots, seed)
        # The last scored token is not an input, but BOS is.
        room = window - (1 + task.max_tokens if task.scorer == "generate" else 0)
        return _assemble(task, question, drawn, lambda text: len(encode(text)) <= room)
