"""From what a model answered to the score of a task, beside everything that says what it means."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from glamcli.evals.asking.question import Question
from glamcli.evals.results.scores import Measured, Reported, Score, Subset
from glamcli.evals.scoring import totals
from glamcli.evals.scoring.answer import rules
from glamcli.evals.scoring.choice import Outcome, text_digest
from glamcli.evals.tasks.schema import Task


def score(
    name: str,
    setting: str,
    shots: int,
    task: Task,
    outcomes: Sequence[Outcome],
    skipped: Sequence[str],
    conditions: Mapping[str, Any],
    seed: int,
) -> Score:
    """The score of a task; `conditions` are kept beside it."""
    records = tuple(
        {"task": name, "setting": setting, "shots": shots, "index": each.index, **each.record}
        for each in outcomes
    )
    questions = [each.prompt.question for each in outcomes]
    return Score(
        task=name,
        shots=shots,
        setting=setting,
        measured=measured(task, records, questions, seed, setting),
        num_items=len(outcomes),
        shots_fitted=sum(each.prompt.shots for each in outcomes) / len(outcomes),
        num_trimmed=sum(each.prompt.shots < shots for each in outcomes),
        num_cut=sum(each.num_cut > 0 for each in outcomes),
        skipped=tuple(skipped),
        conditions={
            **conditions,
            "items_sha256": digest([each.key for each in questions]),
            "prompts_sha256": digest([text_digest(each.prompt) for each in outcomes]),
        },
        subsets=_subsets(task, records, questions, seed),
        items=records,
    )


def measured(
    task: Task,
    records: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    seed: int,
    setting: str | None = None,
) -> tuple[Measured, ...]:
    """Every metric of the task over some of its items; `setting` None is compared with nobody."""
    found = []
    for name in task.measured:
        total = totals.total(name, records, seed)
        baselines = _baselines(task, name, questions)
        others = tuple(
            Reported(each.model, value, each.confirmed)
            for each in task.published
            if (each.of or task.measured[0]) == name
            if setting is not None and (value := each.at(setting)) is not None
        )
        found.append(Measured(name, total.value, total.stderr, baselines, total.interval, others))
    return tuple(found)


def _baselines(task: Task, name: str, questions: Sequence[Question]) -> Mapping[str, float | None]:
    """What guessing would score, for metrics of which that can be said."""
    if task.scorer == "generate" and name in ("em", "f1"):
        answers = [each.references for each in questions]
        return totals.text_baselines(answers, name, task.normalize, **rules(task))
    if task.scorer != "generate" and name == "accuracy":
        accepted = [each.accepted for each in questions]
        return totals.choice_baselines([each.options for each in questions], accepted)
    return {"random": None, "position": None, "majority": None}


def _subsets(
    task: Task, records: Sequence[Mapping[str, Any]], questions: Sequence[Question], seed: int
) -> tuple[Subset, ...]:
    found = []
    for number, field in enumerate(task.by):
        for value in sorted({each.by[number] for each in questions}):
            chosen = [index for index, each in enumerate(questions) if each.by[number] == value]
            some = [records[index] for index in chosen]
            asked = [questions[index] for index in chosen]
            found.append(Subset(field, value, len(some), measured(task, some, asked, seed)))
    return tuple(found)


def digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order."""
    return hashlib.sha256("".join(texts).encode()).hexdigest()
