"""Chance baselines: what guessing without a model would score, by the task's own metrics.

`random`: an option drawn evenly, in expectation; `position`: always the option at one position,
the best one; `majority`: always one text, the best of the options where these are the same for all
items, or the free answer that most items accept. None where that has no meaning.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glamcli.evals.asking.question import Question
from glamcli.evals.scoring.task_metrics import Total
from glamcli.evals.scoring.text_metrics import normalized, text_metric
from glamcli.evals.tasks.schema import Task

_UNKNOWN: dict[str, float | None] = {"random": None, "position": None, "majority": None}


def chance(
    task: Task, metric: str, questions: Sequence[Question], records: Sequence[Mapping[str, Any]]
) -> Mapping[str, float | None]:
    """The baselines of a metric of a task over some of its items."""
    if metric == "perplexity":
        uniform = [{"answer_nats": each["uniform_nats"]} for each in records]
        return {**_UNKNOWN, "random": Total(metric, uniform).value}
    if task.scorer != "generate":
        is_text = metric in ("em", "f1")  # of the text of the chosen option (ReCoRD)
        return _UNKNOWN if is_text else _choice_baselines(metric, questions, records)
    if metric == "macro_f1":
        wanted = [each["wanted_class"] for each in records]
        guesses = [{**each, "found_class": _most_common(wanted)} for each in records]
        return {**_UNKNOWN, "majority": Total(metric, guesses).value}
    if metric == "accuracy":
        return _UNKNOWN
    # Always the answer that most items accept; of those that equally many accept, the first by
    # alphabet.
    written: dict[str, str] = {}
    accepted = []
    for question in questions:
        texts = [each if isinstance(each, str) else " ".join(each) for each in question.references]
        by_form = {normalized(text, task.normalize): text for text in texts}
        accepted += by_form
        written = by_form | written
    best = written[_most_common(accepted)]
    rules = {"references": task.references, "no_answer": task.no_answer}
    values = [
        text_metric(metric, best, each.references, task.normalize, **rules) for each in questions
    ]
    return {**_UNKNOWN, "majority": math.fsum(values) / len(values)}


def _choice_baselines(
    metric: str, questions: Sequence[Question], records: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Baselines of a metric of tasks with options."""

    def guessed(guess: Callable[[Sequence[str]], Iterable[int]]) -> float:
        found = []
        for question, record in zip(questions, records, strict=True):
            tied = [*guess(question.options)]
            right = sum(option in question.accepted for option in tied)
            made = {"tied": tied, "chosen": None, "found_class": None}
            found.append({**record, **made, "accuracy": right / max(len(tied), 1)})
        return Total(metric, found).value

    longest = max(len(each.options) for each in questions)
    at = [guessed(lambda texts, p=p: range(len(texts))[p : p + 1]) for p in range(longest)]
    fixed = {tuple(sorted(each.options)) for each in questions}
    of_texts = [
        guessed(lambda texts, wanted=wanted: [texts.index(wanted)])
        for wanted in (fixed.pop() if len(fixed) == 1 else ())
    ]
    return {
        "random": guessed(lambda texts: range(len(texts))),
        "position": max(at),
        "majority": max(of_texts, default=None),
    }


def _most_common(texts: Iterable[str]) -> str:
    counts = Counter(texts)
    return min(counts, key=lambda text: (-counts[text], text))
