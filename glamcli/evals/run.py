"""A suite on a model: read every task, ask, score, and record what the numbers mean.

Called by `glam eval`, by training and at its end, and from Python. A task that fails is reported;
the others are scored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from glamcli.errors import DataError, GlamError, RecipeError
from glamcli.evals.asking.prompts import Prompt, TaskQuestions
from glamcli.evals.results.journal import Journal, inputs_digest
from glamcli.evals.results.scores import Explanation, Failure, Results, Score
from glamcli.evals.scoring.answer import answer_freely
from glamcli.evals.scoring.choice import ItemResult, answer_choices
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.totals import averages, task_score
from glamcli.evals.tasks.items import Library
from glamcli.evals.tasks.schema import Task
from glamcli.evals.tasks.suites import SuiteFile, TaskFile
from glamcli.progress import Phase, Progress
from glamcli.stored_runs import RESULTS_FOLDER
from glamcli.trained import Trained


def evaluate(
    trained: Trained,
    suite: SuiteFile,
    *,
    progress: Progress,
    shots: Sequence[int | str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    explain: tuple[str | None, int] | None = None,
    journal: Journal | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> Results:
    """Scores of every task at every number of shots (`few`: the task's own).

    `journal` holds what an unfinished evaluation has scored already. `limit` takes the first
    items of each task. With `explain` (task, item number from 0) only that item is scored, and
    everything about it is reported. `between_batches` may raise (no GlamError) to abandon it.

    Raises: RecipeError when `explain` names no task of the suite.
    """
    settings = tuple(dict.fromkeys(suite.settings.shots if shots is None else shots))
    files = _explained_files(suite, explain)
    asked = [suite.sha256, [file.sha256 for file in files], list(settings), limit, seed]
    trained.host.alike(f"suite `{suite.name}`", lambda: asked, lambda asked: asked)
    tasks, failures = _read_tasks(trained, files, data_dir, None if explain else limit)
    scoring = _Scoring(trained, suite, seed, limit, journal or Journal())
    scores: list[Score] = []
    explanations: list[Explanation] = []
    total = sum(1 if explain else len(each.at(0).questions) for each in tasks) * len(settings)
    with progress.phase("evaluating", total, "items") as phase:
        advance = _advancing(phase, between_batches)
        for each in tasks:
            for setting, count in _settings(each, settings, failures):
                phase.note(f"{each.file.name}, {count} shots")
                try:
                    if explain:
                        explanations.append(scoring.explain(each, count, explain[1]))
                    else:
                        scores.append(scoring.score(each, setting, count, advance))
                except GlamError as error:
                    failures.append(Failure(each.file.name, setting, error))
    order, listed = [file.name for file in suite.tasks], [None, *map(str, settings)]
    for found in (scores, failures):
        found.sort(key=lambda each: (order.index(each.task), listed.index(each.setting)))
    explanations.sort(key=lambda each: each.shots)
    means, rule = averages(suite.settings, scores, listed[1:])
    return Results(
        suite=suite.name,
        model=trained.described(),
        scores=tuple(scores),
        failures=tuple(failures),
        explanations=tuple(explanations),
        averages=means,
        averaging=rule,
        preset=suite.preset,
        shots=None if settings == tuple(suite.settings.shots) else tuple(map(str, settings)),
        seed=seed,
        limit=limit,
    )


def _advancing(phase: Phase, between_batches: Callable[[], None]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        phase.advance(count)
        between_batches()

    return advance


def _read_tasks(
    trained: Trained, files: Sequence[TaskFile], data_dir: Path | None, limit: int | None
) -> tuple[list[TaskQuestions], list[Failure]]:
    """The tasks whose items can be read, in all processes, and the others."""
    tasks, failures = [], []
    library = Library(data_dir, trained.documents)
    for file in files:
        try:
            reading = partial(TaskQuestions, file, library, limit)
            tasks.append(trained.host.alike(f"items of task `{file.name}`", reading))
        except GlamError as error:
            failures.append(Failure(file.name, None, error))
    return tasks, failures


def _settings(
    ready: TaskQuestions, settings: Sequence[int | str], failures: list[Failure]
) -> list[tuple[str, int]]:
    """Settings with their number of shots for this task, most first: their larger programs serve
    the shorter prompts as well."""
    found = []
    for setting in settings:
        try:
            found.append((str(setting), ready.num_shots(setting)))
        except GlamError as error:
            failures.append(Failure(ready.file.name, str(setting), error))
    return sorted(found, key=lambda each: -each[1])


def _explained_files(
    suite: SuiteFile, explain: tuple[str | None, int] | None
) -> tuple[TaskFile, ...]:
    if explain is None:
        return suite.tasks
    task, index = explain
    names = ", ".join(f"`{file.name}`" for file in suite.tasks)
    found = tuple(file for file in suite.tasks if task in (None, file.name))
    if not found:
        raise RecipeError(f"suite `{suite.name}` has no task `{task}`", hint=f"it has {names}")
    if len(found) > 1:
        raise RecipeError(f"which task is item {index} of?", hint=f"write TASK:N; tasks: {names}")
    return found


@contextmanager
def resumable(
    trained: Trained, asked: Mapping[str, Any], progress: Progress, *, fresh: bool = False
) -> Iterator[Journal]:
    """The journal of the evaluation made inside this block, removed when the block ends.

    `asked` is everything besides the model that decides the scores. The journal holds the batches
    of an interrupted evaluation of the same, unless `fresh`. The first process reads and writes
    the file; the others get a copy, so that all skip the same batches.
    """
    journal = Journal()
    if trained.run_dir is not None:
        folder = trained.run_dir / RESULTS_FOLDER
        conditions = {**trained.described(), **asked}  # reads the weights, in all processes
        if trained.host.is_first:
            try:
                journal = Journal.open(folder, conditions, fresh=fresh, warn=progress.warn)
            except OSError as error:
                progress.warn(f"an interruption would lose scores: {error.strerror}: {folder}")
        journal.known = trained.host.of_first("journal", journal.known)
    if journal.known:
        progress.say(
            f"continuing from {len(journal.known)} batches of an unfinished evaluation"
            " (`--fresh` starts over)"
        )
    try:
        yield journal
    except BaseException as error:
        journal.flush()
        if journal.path is not None and isinstance(error, KeyboardInterrupt):
            progress.say("scores so far are kept: the same command continues from there")
        raise
    journal.finish()


class _Scoring:
    """What all scores of one evaluation have in common."""

    def __init__(
        self, trained: Trained, suite: SuiteFile, seed: int, limit: int | None, journal: Journal
    ):
        self.trained = trained
        self.suite = suite
        self.seed = seed
        self.limit = limit
        self.journal = journal
        self.likelihoods = Likelihoods.of(trained, journal)

    def score(
        self, ready: TaskQuestions, setting: str, shots: int, advance: Callable[[int], None]
    ) -> Score:
        """One task at one number of shots."""
        asked = ready.at(shots)
        task, trained = asked.task, self.trained
        found, skipped = self._answers(ready, task, self._prompts(ready, shots), advance)
        conditions = {
            "preset": self.suite.preset,
            "bos": True,
            "window": trained.window,
            "dispatch": trained.decoder.eval_dispatch,
            "dtype": trained.decoder.model.activation_dtype,
            "seed": self.seed,
            "limit": self.limit,
            "items_from": ready.items[0].place,
            "shots_source": task.shots.source,
            "shots_draw": task.shots.draw,
            "shots_separator": task.shots.separator,
            "suite_sha256": self.suite.sha256,
            "task_sha256": ready.file.sha256,
        }
        skipped = [*asked.skipped, *skipped]
        name = ready.file.name
        return task_score(name, setting, shots, task, found, skipped, conditions, self.seed)

    def explain(self, ready: TaskQuestions, shots: int, index: int) -> Explanation:
        """The exact texts and tokens of one item."""
        prompts = self._prompts(ready, shots, index)
        (found,), _ = self._answers(ready, ready.at(shots).task, prompts)
        return found.explanation(ready.file.name, shots, index)

    def _answers(
        self,
        ready: TaskQuestions,
        task: Task,
        prompts: Sequence[Prompt],
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[list[ItemResult], list[str]]:
        """What the model chose or wrote, and items skipped with the reason.

        Raises:
            DataError: every item was skipped.
        """
        trained, skipped = self.trained, []
        if task.scorer == "generate":
            found = answer_freely(
                task, prompts, trained.generator, self.likelihoods, advance, self.journal
            )
        else:
            found, skipped = answer_choices(
                task, prompts, self.likelihoods, trained.tokenizer, advance
            )
        if not found:
            raise DataError(f"task `{ready.file.name}`: no item could be scored: {skipped[0]}")
        return found, skipped

    def _prompts(self, ready: TaskQuestions, shots: int, index: int | None = None) -> list[Prompt]:
        """The prompts of all questions in their order, or of one: the same in all processes."""
        name, trained = ready.file.name, self.trained

        def make() -> list[Prompt]:
            questions = ready.at(shots).questions
            if index is not None and not 0 <= index < len(questions):
                raise RecipeError(
                    f"task `{name}` has items 0 to {len(questions) - 1}, no item {index}"
                )
            return [
                ready.prompt(each, shots, self.seed, trained.tokenizer.encode, trained.window)
                for each in (questions if index is None else [questions[index]])
            ]

        return trained.host.alike(
            f"prompts of task `{name}` at {shots} shots",
            make,
            lambda made: inputs_digest(
                [each.contexts, each.question.continuations] for each in made
            ),
        )
