"""A task whose items are read: its questions, and demonstrations when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from glamcli.errors import DataError, RecipeError
from glamcli.evals.asking import prompts
from glamcli.evals.asking.prompts import Pool, Prompt
from glamcli.evals.asking.question import Question, ask, left_out
from glamcli.evals.tasks.items import Item, Library
from glamcli.evals.tasks.schema import Task
from glamcli.evals.tasks.suites import TaskFile


@dataclass(frozen=True)
class Asked:
    """A task with its questions, as it is asked without or with demonstrations."""

    task: Task
    questions: list[Question]
    skipped: tuple[str, ...]
    pool: Pool | None
    """None without demonstrations."""


@dataclass
class Ready:
    """Questions of a task file; what needs demonstrations is read when it is asked for, so a
    missing pool does not stop the zero-shot score."""

    file: TaskFile
    library: Library
    items: list[Item]
    limit: int | None
    _asked: dict[bool, Asked] = field(default_factory=dict)

    def at(self, shots: int) -> Asked:
        """The task as it is asked behind this many demonstrations."""
        with_shots = shots > 0
        if with_shots not in self._asked:
            self._asked[with_shots] = self._ask(with_shots)
        return self._asked[with_shots]

    def _ask(self, with_shots: bool) -> Asked:
        task = self.file.at(int(with_shots))
        assert task is not None  # `read` refuses files that could not be read
        pool = None
        if with_shots:
            pool = Pool(task, self.library.pool(task, self.file.path, self.items))
        all_questions = [ask(task, item) for item in self.items[: self.limit]]
        reasons = [left_out(task, each) for each in all_questions]
        kept = [each for each, why in zip(all_questions, reasons, strict=True) if why is None]
        if not kept:
            raise DataError(f"task `{self.file.name}`: no item is left to be asked")
        return Asked(task, kept, tuple(why for why in reasons if why is not None), pool)

    def prompt(
        self, question: Question, shots: int, seed: int, encode: Callable[[str], list[int]],
        window: int,
    ) -> Prompt:  # fmt: skip
        """The question behind as many of its demonstrations as fit into the window."""
        asked = self.at(shots)
        task, drawn = asked.task, []
        if asked.pool is not None:
            drawn = prompts.draw(task, self.file.name, question, asked.pool, shots, seed)
        # The last scored token is no input, but BOS is one.
        room = window - (1 + task.max_tokens if task.scorer == "generate" else 0)
        return prompts.assemble(task, question, drawn, lambda text: len(encode(text)) <= room)


def read(file: TaskFile, library: Library, limit: int | None) -> Ready:
    """The questions of a task file.

    Raises:
        GlamError: the file or its items cannot be read.
    """
    if file.task is None:
        raise file.error or DataError(f"task `{file.name}` could not be read")
    ready = Ready(file, library, library.items(file.task, file.path), limit)
    ready.at(0)
    return ready


def number_of_shots(setting: int | str, file: TaskFile) -> int:
    """What a setting means for a task.

    Raises:
        RecipeError: `few`, and the task does not say how many.
    """
    if isinstance(setting, int):
        return setting
    task = file.with_shots
    if task is None or task.shots.few is None:
        raise RecipeError(
            f"task `{file.name}` does not say what `few` means", hint="set `shots.few` in its file"
        )
    return task.shots.few
