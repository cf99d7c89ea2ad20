"""The score of a task from its items, with what defines its meaning, and averages of a suite.

Averages have a rule that is shown beside them: an entry is a task (its first metric) or
`task/metric`, and every entry counts the same, whatever its number of items. What is missing is
named, and the mean of the rest is never shown without it.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from glamcli.evals.asking.prompts import Prompt
from glamcli.evals.asking.question import Question
from glamcli.evals.results.scores import Average, Measured, Reported, Score, Subset
from glamcli.evals.scoring.chance import chance
from glamcli.evals.scoring.choice import ItemResult
from glamcli.evals.scoring.task_metrics import Total
from glamcli.evals.tasks.schema import Published, Suite, Task

_OVERALL = "overall"


def task_score(
    name: str,
    setting: str,
    shots: int,
    task: Task,
    results: Sequence[ItemResult],
    skipped: Sequence[str],
    conditions: Mapping[str, Any],
    seed: int,
) -> Score:
    """The score of a task, beside its conventions and the other `conditions` of the evaluation."""
    records = tuple(_record(name, setting, shots, each) for each in results)
    questions = [each.prompt.question for each in results]
    return Score(
        task=name,
        shots=shots,
        setting=setting,
        measured=_measured(task, records, questions, seed, setting),
        num_items=len(results),
        shots_fitted=sum(each.prompt.shots for each in results) / len(results),
        num_trimmed=sum(each.prompt.shots < shots for each in results),
        num_cut=sum(each.num_cut > 0 for each in results),
        skipped=tuple(skipped),
        conditions={
            **_conventions(task),
            **conditions,
            "items_sha256": _digest([each.key for each in questions]),
            "prompts_sha256": _digest([each["prompt_sha256"] for each in records]),
        },
        subsets=_subsets(task, records, questions, seed),
        items=records,
        num_tied=sum("tied" in each for each in records),
        num_equal=sum(each.has_equal_options for each in questions),
    )


def _record(name: str, setting: str, shots: int, result: ItemResult) -> dict[str, Any]:
    """The line of the items file."""
    prompt, question = result.prompt, result.prompt.question
    return {
        "task": name,
        "setting": setting,
        "shots": shots,
        "index": result.index,
        "place": question.place,
        "key": question.key,
        "group": question.group,
        "by": list(question.by),
        "shots_fitted": prompt.shots,
        "cut_tokens": result.num_cut,
        "prompt_sha256": _prompt_digest(prompt),
        **result.record,
    }


def _prompt_digest(prompt: Prompt) -> str:
    """SHA-256 of everything a model is shown for one item."""
    digest = hashlib.sha256()
    endings = prompt.question.continuations or ("",) * len(prompt.contexts)
    for context, ending in zip(prompt.contexts, endings, strict=True):
        digest.update(f"{len(context)},{len(ending)}:{context}{ending}".encode("utf-8", "replace"))
    return digest.hexdigest()


def _conventions(task: Task) -> dict[str, Any]:
    """The choices of a task that decide what its number means, for the record beside the score."""
    found: dict[str, Any] = {"scorer": task.scorer, "delimiter": task.delimiter}
    if task.scorer == "generate":
        found |= {
            "normalize": task.normalize,
            "references": task.references,
            "no_answer": task.no_answer,
            "min_agreement": task.min_agreement,
            "stop": list(task.stop),
            "max_tokens": task.max_tokens,
            "beam": task.beam,
            "length_alpha": task.length_alpha if task.beam > 1 else None,
        }
    if task.scorer == "uncond":
        found["uncond_context"] = task.uncond_context
    if task.contexts is not None:
        found["partial"] = True
    if task.right is not None:
        found["several_right"] = True
    if task.normalize == "drop":
        found["span_separator"] = task.span_separator
    return found


def _measured(
    task: Task,
    records: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    seed: int,
    setting: str | None = None,
) -> tuple[Measured, ...]:
    """Every metric of the task over some items; without published scores for `setting` None."""
    made = []
    for name in task.measured:
        found = Total(name, records, seed)
        baselines = chance(task, name, questions, records)
        others = published_at(task.published, name, setting, task.measured[0])
        made.append(Measured(name, found.value, found.stderr, baselines, found.interval, others))
    return tuple(made)


def published_at(
    listed: Sequence[Published], of: str, setting: str | None, default: str | None = None
) -> tuple[Reported, ...]:
    """Scores of other models at a setting, of what is named, or of `default` where nothing is."""
    return tuple(
        Reported(each.model, value, each.confirmed)
        for each in listed
        if (each.of or default) == of and (value := each.at(setting)) is not None
    )


def _subsets(
    task: Task, records: Sequence[Mapping[str, Any]], questions: Sequence[Question], seed: int
) -> tuple[Subset, ...]:
    found = []
    for number, field in enumerate(task.by):
        for value in sorted({each.by[number] for each in questions}):
            chosen = [index for index, each in enumerate(questions) if each.by[number] == value]
            some = [records[index] for index in chosen]
            asked = [questions[index] for index in chosen]
            found.append(Subset(field, value, len(some), _measured(task, some, asked, seed)))
    return tuple(found)


def _digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order."""
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def averages(
    suite: Suite, scores: Sequence[Score], settings: Sequence[str]
) -> tuple[tuple[Average, ...], str]:
    """Every average of the suite at every number of shots, `overall` last, and their rule in
    words: empty for a suite without any."""
    wanted = {name: list(entries) for name, entries in suite.averages.items()}
    if suite.overall:
        wanted[_OVERALL] = [entry for name in suite.overall for entry in suite.averages[name]]
    made = []
    for name, entries in wanted.items():
        for setting in settings:
            found = _entries(scores, setting)
            values = [found[entry] for entry in entries if entry in found]
            average = Average(
                name=name,
                setting=setting,
                value=math.fsum(values) / len(values) if values else None,
                num_entries=len(entries),
                missing=tuple(entry for entry in entries if entry not in found),
                published=published_at(suite.published, name, setting),
            )
            made.append(average)
    return tuple(made), _averaging_rule(suite)


def _averaging_rule(suite: Suite) -> str:
    if not suite.averages:
        return ""
    words = "averages: arithmetic means of task scores, every entry weighs the same"
    entries = {entry for each in suite.averages.values() for entry in each}
    tasks: dict[str, list[str]] = {}
    for entry in sorted(entries):
        task, _, metric = entry.partition("/")
        tasks.setdefault(task, []).append(metric)
    for task, metrics in tasks.items():
        if len(metrics) > 1:
            words += f"; {task} counts {len(metrics)} times, by {' and '.join(metrics)}"
    if suite.overall:
        count = sum(len(suite.averages[name]) for name in suite.overall)
        words += f"; overall: over the {count} entries of {' and '.join(suite.overall)}"
    return words


def _entries(scores: Sequence[Score], setting: str) -> dict[str, float]:
    """Scores by entry: every metric of a task, and its first one by the task's name alone."""
    found: dict[str, float] = {}
    for score in scores:
        if score.setting == setting:
            found[score.task] = score.measured[0].value
            found |= {f"{score.task}/{each.metric}": each.value for each in score.measured}
    return found
