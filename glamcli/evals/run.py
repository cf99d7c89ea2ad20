"""A suite on a model: read every task, ask, score, and record what the numbers mean.

Called by `glam eval` and at the end of `glam train`. A task that fails is reported and the others
go on.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import glamcli
from glamcli.data.tokenizer import Tokenizer
from glamcli.errors import DataError, GlamError, RecipeError
from glamcli.evals.asking.prompts import Prompt
from glamcli.evals.asking.ready import Ready, number_of_shots, read
from glamcli.evals.results.journal import Journal, inputs_digest
from glamcli.evals.results.scores import Explanation, Failure, Results, Score
from glamcli.evals.scoring.answer import answer_freely, explain_answer
from glamcli.evals.scoring.batches import COMPILE_BATCHES
from glamcli.evals.scoring.choice import add_answer_nats, answer_choices, explain_choice
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.totals import averages, averaging_rule, task_score
from glamcli.evals.tasks.items import Documents, Library
from glamcli.evals.tasks.schema import Task, conventions
from glamcli.evals.tasks.suites import SuiteFile, TaskFile
from glamcli.generate import Generator
from glamcli.hosts.join import Host
from glamcli.model.decoder import Decoder
from glamcli.model.digest import digest
from glamcli.progress import Progress

CPU_BATCH_TOKENS = 2048
BATCH_TOKENS = 32768


@dataclass
class Subject:
    """A model to be evaluated, with what must be recorded beside its scores."""

    decoder: Decoder
    params: Any
    tokenizer: Tokenizer
    window: int
    """tokens of context at most: the row length it was trained with."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """of the weights, for JSON: run, step, hashes of recipe and data."""
    documents: Callable[[], Documents] | None = None
    """held-out documents by source, for the quick suite."""
    journal: Journal = field(default_factory=Journal)
    """what an unfinished evaluation of it has found."""
    host: Host = field(default_factory=Host)
    """this process among those that hold the weights; all of them evaluate alike."""

    @property
    def dispatch(self) -> str | None:
        """How tokens reach experts while scoring; None for a dense model."""
        moe = self.decoder.moe
        return None if moe is None else moe.eval_dispatch

    @property
    def batch_tokens(self) -> int:
        """Tokens that one program reads at once."""
        return CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else BATCH_TOKENS

    @cached_property
    def likelihoods(self) -> Likelihoods:
        return Likelihoods(
            self.decoder,
            self.params,
            window=self.window,
            vocab_size=self.decoder.model.vocab_size,
            dispatch=self.dispatch,
            batch_tokens=self.batch_tokens,
            journal=self.journal,
        )

    @cached_property
    def generator(self) -> Generator:
        return Generator(
            self.decoder,
            self.params,
            self.tokenizer,
            dispatch=self.dispatch,
            compile_tokens=COMPILE_BATCHES * self.batch_tokens,
        )

    def renew(self, params: Any, identity: Mapping[str, Any]) -> None:
        """Goes on with other weights of the same model, as training makes them."""
        self.params, self.identity = params, identity
        for made in ("likelihoods", "generator"):
            if made in self.__dict__:
                self.__dict__[made].renew(params)

    def described(self) -> dict[str, Any]:
        """For the results: the identity, and what the scores depend on besides the weights."""
        return {
            **self.identity,
            "params_digest": digest(self.params),
            "tokenizer": self.tokenizer.fingerprint,
            "window": self.window,
            "dispatch": self.dispatch,
            "dtype": self.decoder.model.activation_dtype,
            "backend": jax.default_backend(),
            "versions": {
                "glam": glamcli.__version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }


def evaluate(
    subject: Subject,
    suite: SuiteFile,
    *,
    progress: Progress,
    shots: Sequence[int | str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    explain: tuple[str | None, int] | None = None,
) -> Results:
    """Scores of every task at every number of shots (`few`: the task's own).

    `limit` takes the first items of each task. With `explain` (task, item number from 0) only
    that item is scored, and everything about it is told.

    Raises:
        RecipeError: `explain` names no task of the suite.
    """
    settings = tuple(dict.fromkeys(suite.shots if shots is None else shots))
    files = _explained_files(suite, explain)
    asked = [suite.sha256, [file.sha256 for file in files], list(settings), limit, seed]
    subject.host.alike(f"suite `{suite.name}`", lambda: asked, lambda asked: asked)
    library = Library(data_dir, subject.documents)
    tasks: list[Ready] = []
    failures: list[Failure] = []
    for file in files:
        try:
            reading = partial(read, file, library, None if explain else limit)
            tasks.append(subject.host.alike(f"items of task `{file.name}`", reading))
        except GlamError as error:
            failures.append(Failure(file.name, None, error))
    scores: list[Score] = []
    explanations: list[Explanation] = []
    total = sum(1 if explain else len(each.at(0).questions) for each in tasks) * len(settings)
    with progress.phase("evaluating", total, "items") as phase:
        for each in tasks:
            for setting, count in _settings(each, settings, failures):
                phase.note(f"{each.file.name}, {count} shots")
                try:
                    if explain:
                        explanations.append(_explain(subject, each, count, seed, explain[1]))
                    else:
                        run = _Run(subject, suite, seed, limit)
                        scores.append(run.score(each, setting, count, phase.advance))
                except GlamError as error:
                    failures.append(Failure(each.file.name, setting, error))
    order = {file.name: number for number, file in enumerate(suite.tasks)}
    position = {str(setting): number for number, setting in enumerate(settings)}
    scores.sort(key=lambda each: (order[each.task], position[each.setting]))
    failures.sort(key=lambda each: (order[each.task], position.get(each.setting or "", -1)))
    explanations.sort(key=lambda each: (order[each.task], each.shots))
    return Results(
        suite=suite.name,
        model=subject.described(),
        scores=tuple(scores),
        failures=tuple(failures),
        explanations=tuple(explanations),
        averages=tuple(averages(suite, scores, list(position))),
        averaging=averaging_rule(suite),
        preset=suite.preset,
        shots=None if settings == tuple(suite.shots) else tuple(map(str, settings)),
        seed=seed,
        limit=limit,
    )


def _settings(
    ready: Ready, settings: Sequence[int | str], failures: list[Failure]
) -> list[tuple[str, int]]:
    """Settings with their number of shots for this task, most first: their larger programs serve
    the shorter prompts as well."""
    found = []
    for setting in settings:
        try:
            found.append((str(setting), number_of_shots(setting, ready.file)))
        except GlamError as error:
            failures.append(Failure(ready.file.name, str(setting), error))
    return sorted(found, key=lambda each: -each[1])


def _explained_files(
    suite: SuiteFile, explain: tuple[str | None, int] | None
) -> tuple[TaskFile, ...]:
    if explain is None:
        return suite.tasks
    names = ", ".join(f"`{file.name}`" for file in suite.tasks)
    found = tuple(file for file in suite.tasks if explain[0] in (None, file.name))
    if not found:
        raise RecipeError(
            f"suite `{suite.name}` has no task `{explain[0]}`", hint=f"it has {names}"
        )
    if len(found) > 1:
        raise RecipeError(
            "which task is item " + str(explain[1]) + " of?", hint=f"write TASK:N; tasks: {names}"
        )
    return found


@dataclass(frozen=True)
class _Run:
    """What all scores of one evaluation have in common."""

    subject: Subject
    suite: SuiteFile
    seed: int
    limit: int | None

    def score(
        self, ready: Ready, setting: str, shots: int, advance: Callable[[int], None]
    ) -> Score:
        subject = self.subject
        prompts = _prompts(subject, ready, shots, self.seed)
        asked = ready.at(shots)
        task = asked.task
        likelihoods, tokenizer = subject.likelihoods, subject.tokenizer
        skipped: list[str] = []
        if task.scorer == "generate":
            found = answer_freely(
                task, prompts, subject.generator, subject.window, advance, subject.journal
            )
            if "perplexity" in task.measured:
                add_answer_nats(task, found, likelihoods, tokenizer)
        else:
            found, skipped = answer_choices(task, prompts, likelihoods, tokenizer, advance)
        if not found:
            raise DataError(f"task `{ready.file.name}`: no item could be scored: {skipped[0]}")
        return task_score(
            ready.file.name,
            setting,
            shots,
            task,
            found,
            [*asked.skipped, *skipped],
            {**conventions(task), **self._conditions(ready, task)},
            self.seed,
        )

    def _conditions(self, ready: Ready, task: Task) -> dict[str, Any]:
        return {
            "preset": self.suite.preset,
            "bos": True,
            "window": self.subject.window,
            "dispatch": self.subject.dispatch,
            "dtype": self.subject.decoder.model.activation_dtype,
            "seed": self.seed,
            "limit": self.limit,
            "items_from": ready.items[0].place,
            "shots_source": task.shots.source,
            "shots_draw": task.shots.draw,
            "shots_separator": task.shots.separator,
            "suite_sha256": self.suite.sha256,
            "task_sha256": ready.file.sha256,
        }


def _prompts(
    subject: Subject, ready: Ready, shots: int, seed: int, index: int | None = None
) -> list[Prompt]:
    """What is asked in the order of the questions, or of one of them: the same in all processes."""
    name = ready.file.name

    def made() -> list[Prompt]:
        questions = ready.at(shots).questions
        if index is not None and not 0 <= index < len(questions):
            raise RecipeError(f"task `{name}` has items 0 to {len(questions) - 1}, no item {index}")
        return [
            ready.prompt(each, shots, seed, subject.tokenizer.encode, subject.window)
            for each in (questions if index is None else [questions[index]])
        ]

    def told(prompts: list[Prompt]) -> str:
        return inputs_digest([each.contexts, each.question.continuations] for each in prompts)

    return subject.host.alike(f"prompts of task `{name}` at {shots} shots", made, told)


def _explain(subject: Subject, ready: Ready, shots: int, seed: int, index: int) -> Explanation:
    (prompt,) = _prompts(subject, ready, shots, seed, index)
    name, task = ready.file.name, ready.at(shots).task
    if task.scorer == "generate":
        generator, window = subject.generator, subject.window
        return explain_answer(task, name, shots, index, prompt, generator, window)
    likelihoods, tokenizer = subject.likelihoods, subject.tokenizer
    found = explain_choice(task, name, shots, index, prompt, likelihoods, tokenizer)
    if found is None:
        raise DataError(f"{prompt.question.place}: an option is longer than the window")
    return found
