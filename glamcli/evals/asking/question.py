"""From an item to the question a model is asked, as its task file defines it.

A question is `context` + `continuation`; the delimiter between them belongs to the continuation.
What stands before it, demonstrations, is the subject of `prompts.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glamcli.errors import DataError
from glamcli.evals.scoring.text_metrics import Answer, normalized
from glamcli.evals.tasks import template
from glamcli.evals.tasks.items import Item
from glamcli.evals.tasks.schema import Task


@dataclass(frozen=True)
class Question:
    """One item as asked: parallel contexts and continuations, one pair per option.

    For `generate` there is one context, no continuation, and the accepted answers.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    accepted: tuple[int, ...]
    """the right options, the one that demonstrations show first."""
    answers: tuple[str, ...]
    place: str
    key: str
    options: tuple[str, ...] = ()
    """the options as a reader sees them (not the scored texts)."""
    references: tuple[Answer, ...] = ()
    """the accepted answers as they are compared: `answers`, or for DROP their spans."""
    shown: str = ""
    """the answer in demonstrations (of tasks with free answers)."""
    is_true: bool | None = None
    """generate with a label: whether the answer is right (WSC)."""
    group: str | None = None
    by: tuple[str, ...] = ()
    """values of the fields that scores are divided by."""

    @property
    def gold(self) -> int | None:
        """The right option; None where answers are free."""
        return self.accepted[0] if self.accepted else None

    @property
    def has_equal_options(self) -> bool:
        """Whether two options are the same text behind the same context, so that they tie."""
        texts = list(zip(self.contexts, self.continuations, strict=False))
        return len(set(texts)) < len(texts)

    @property
    def gold_context(self) -> str:
        return self.contexts[self.gold or 0]

    def demonstration(self, delimiter: str) -> str:
        """The question with its right answer."""
        if self.gold is None:
            return self.gold_context + delimiter + self.shown
        return self.gold_context + self.continuations[self.gold]


def ask(task: Task, item: Item, shown: bool = False) -> Question:
    """The question of an item; `shown`: only its demonstration is needed.

    Raises:
        DataError: a field is missing or of the wrong kind, or the label names no option.
    """
    asked = _open_question(task, item, shown) if task.scorer == "generate" else _choice(task, item)
    group = None if task.group is None else template.render(task.group, item.fields, item.place)
    by = tuple(
        template.render(f"{{{path}}}", item.fields, item.place)
        for path in (() if shown else task.by)
    )
    return replace(asked, group=group, by=by)


def _choice(task: Task, item: Item) -> Question:
    fields, place = item.fields, item.place
    if task.contexts is not None and task.continuation is not None:
        contexts = template.texts(fields, task.contexts, place)
        ending = task.delimiter + template.render(task.continuation, fields, place)
        continuations = (ending,) * len(contexts)
        options = contexts
    else:
        options = template.texts(fields, task.options or (), place)
        contexts = (_prompt(task, item),) * len(options)
        text = task.option_text or "{option}"
        continuations = tuple(
            task.delimiter + template.render(text, {**fields, "option": option}, place)
            for option in options
        )
    wanted = task.num_options
    if len(options) < 2 or (wanted is not None and len(options) != wanted):
        need = "two or more" if wanted is None else str(wanted)
        raise DataError(f"{place}: {len(options)} options, need {need}")
    if not all(text.strip() for text in continuations):
        raise DataError(f"{place}: an option is empty")
    accepted = _accepted(task, item, options)
    return Question(contexts, continuations, accepted, (), place, item.key, options)


def _prompt(task: Task, item: Item) -> str:
    fields = item.fields
    if task.history is not None:
        fields = {**fields, "history": "".join(_history_text(task, each) for each in item.earlier)}
    return template.render(task.prompt or "", fields, item.place)


def _history_text(task: Task, earlier: Item) -> str:
    """An earlier item of the same record with its right answer."""
    if task.scorer == "generate":
        answer = _shown_answer(task, earlier)
    else:
        options = template.texts(earlier.fields, task.options or (), earlier.place)
        answer = options[_accepted(task, earlier, options)[0]]
    return template.render(task.history or "", {**earlier.fields, "answer": answer}, earlier.place)


def _open_question(task: Task, item: Item, shown: bool) -> Question:
    references = () if shown and task.shown_answer is not None else _references(task, item)
    answers = tuple(_joined(task, each) for each in references)
    is_true = None
    if task.label is not None:
        is_true = template.look_up(item.fields, task.label, item.place)
        if not isinstance(is_true, int) or is_true not in (0, 1):
            raise DataError(f"{item.place}: `{task.label}` is neither true nor false: {is_true}")
    return Question(
        contexts=(_prompt(task, item),),
        continuations=(),
        accepted=(),
        answers=answers,
        place=item.place,
        key=item.key,
        references=references,
        shown=answers[0] if task.shown_answer is None else _shown_answer(task, item),
        is_true=None if is_true is None else bool(is_true),
    )


def _shown_answer(task: Task, item: Item) -> str:
    if task.shown_answer is not None:
        return template.render(task.shown_answer, item.fields, item.place)
    return _joined(task, _references(task, item)[0])


def _references(task: Task, item: Item) -> tuple[Answer, ...]:
    """The accepted answers, at least one.

    Raises:
        DataError: there is none, and the task has no `no_answer`.
    """
    found: tuple[Answer, ...]
    if task.normalize == "drop":
        values = template.values(item.fields, task.answers or (), item.place)
        found = tuple(spans for each in values if (spans := _spans(each, item.place)))
    else:
        found = template.texts(item.fields, task.answers or (), item.place)
        if found and task.no_answer is not None and task.no_answer_vote:
            found = _by_majority(found, task.no_answer)
    if not found and task.no_answer is not None:
        return (task.no_answer,)
    if not found:
        raise DataError(f"{item.place}: no accepted answer, and the task states no `no_answer`")
    return found


def _by_majority(answers: tuple[str, ...], no_answer: str) -> tuple[str, ...]:
    """Only `no_answer` if at least half of the references are, else the others (QuAC)."""
    given = tuple(answer for answer in answers if answer != no_answer)
    return (no_answer,) if 2 * len(given) <= len(answers) else given


def _spans(answer: Any, place: str) -> tuple[str, ...]:
    """The spans of an answer: a text, or as DROP's files hold it, by `number`, `spans` or `date`.

    Empty when the annotator gave none.
    """
    if isinstance(answer, str):
        return (answer,)
    if not isinstance(answer, Mapping):
        kind = type(answer).__name__
        raise DataError(f"{place}: an answer is {kind}, not a text or DROP's object")
    number, listed = answer.get("number"), answer.get("spans")
    if number not in (None, ""):
        return (str(number),)
    if listed:
        return tuple(str(each) for each in listed)
    date = answer.get("date") or {}
    text = " ".join(str(date.get(part) or "") for part in ("day", "month", "year"))
    return (" ".join(text.split()),) if text.strip() else ()


def _joined(task: Task, answer: Answer) -> str:
    return answer if isinstance(answer, str) else (task.span_separator or ", ").join(answer)


def _accepted(task: Task, item: Item, options: Sequence[str]) -> tuple[int, ...]:
    """The right options, the one that demonstrations show first."""
    if task.right is None:
        return (_gold(task, item, len(options)),)
    right = template.texts(item.fields, task.right, item.place)
    same = {normalized(text, task.normalize) for text in right}
    alike = [n for n, option in enumerate(options) if normalized(option, task.normalize) in same]
    if not alike:
        raise DataError(f"{item.place}: `{task.right}` names no option: {', '.join(right)}")
    return tuple(sorted(alike, key=lambda n: options[n] not in right))


def _gold(task: Task, item: Item, num_options: int) -> int:
    path, place = task.label or "", item.place
    value = template.look_up(item.fields, path, place)
    if task.labels is not None:
        labels: Sequence[Any] = task.labels
        if isinstance(task.labels, str):
            labels = template.values(item.fields, task.labels, place)
            if len(labels) != num_options:
                raise DataError(
                    f"{place}: `{task.labels}` has {len(labels)} entries for {num_options} options"
                )
        # True == 1 in Python; a label written as a number must not match a boolean.
        for index, label in enumerate(labels[:num_options]):
            if label == value and isinstance(label, bool) == isinstance(value, bool):
                return index
        known = ", ".join(f"`{label}`" for label in labels)
        raise DataError(f"{place}: `{path}` is none of {known}: {value}")
    if not isinstance(value, int):
        raise DataError(
            f"{place}: `{path}` is not an index: {value}",
            hint="list its values in the order of the options under `labels`",
        )
    if not 0 <= int(value) < num_options:
        raise DataError(f"{place}: `{path}` is {int(value)}, with {num_options} options")
    return int(value)
