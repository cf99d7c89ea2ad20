"""Tasks with options: log-likelihoods of the options, and the one the model prefers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from glamcli.errors import DataError
from glamcli.evals.asking.prompts import Prompt
from glamcli.evals.asking.question import Question
from glamcli.evals.results.scores import Explanation, Scored
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.packing import Likelihood
from glamcli.evals.scoring.text_metrics import text_metric
from glamcli.evals.scoring.tokens import Encoder, Scorable, scorable
from glamcli.evals.tasks.schema import Task


@dataclass(frozen=True)
class Outcome:
    """One item after scoring."""

    index: int
    prompt: Prompt
    record: dict[str, Any]
    """what is kept in the per-item file."""
    correct: dict[str, float]
    """value of each metric."""
    num_cut: int


@dataclass(frozen=True)
class Asked:
    """One item as token requests."""

    prompt: Prompt
    requests: list[Scorable]
    """its options."""
    without: list[Scorable]
    """for `uncond`: the same options behind the context of the denominator."""


def answer_choices(
    task: Task,
    prompts: Sequence[Prompt],
    model: Likelihoods,
    encoder: Encoder,
    advance: Callable[[int], None],
) -> tuple[list[Outcome], list[str]]:
    """Outcomes in the order of the prompts, and items skipped with the reason."""
    outcomes, skipped, asked = [], [], []
    for index, prompt in enumerate(prompts):
        made = requests(task, prompt, encoder, model.window)
        if made is None:
            skipped.append(f"{prompt.question.place}: an option is longer than the window")
        else:
            asked.append((index, made))
    found = _likelihoods([made for _, made in asked], model, advance)
    for (index, made), likelihoods in zip(asked, found, strict=True):
        outcomes.append(_outcome(task, index, made, likelihoods))
    return outcomes, skipped


def requests(task: Task, prompt: Prompt, encoder: Encoder, window: int) -> Asked | None:
    """Token requests of one item; None when an option does not fit into the window."""
    continuations = prompt.question.continuations
    made = scorable(encoder, list(zip(prompt.contexts, continuations, strict=True)), window)
    if made is None:
        return None
    if task.scorer != "uncond":
        return Asked(prompt, made, [])
    pairs = [(task.uncond_context, continuation) for continuation in continuations]
    without = scorable(encoder, pairs, window)
    return None if without is None else Asked(prompt, made, without)


def _likelihoods(
    asked: Sequence[Asked], model: Likelihoods, advance: Callable[[int], None]
) -> list[list[Likelihood]]:
    """Likelihoods per item. `advance` counts items."""
    # Denominators of `uncond` recur, with the same options and at every number of shots.
    known = model.remembered
    new = dict.fromkeys(request for each in asked for request in each.without)
    alone = [request for request in new if request not in known]
    groups = [each.requests for each in asked] + [[request] for request in alone]
    total = sum(len(group) for group in groups)
    done = shown = 0

    def some_done(count: int) -> None:
        nonlocal done, shown
        done += count
        now = done * len(asked) // total
        advance(now - shown)
        shown = now

    scored = model.score(groups, some_done)
    known.update(
        (request, found[0]) for request, found in zip(alone, scored[len(asked) :], strict=True)
    )
    return [
        scored[index] + [known[request] for request in each.without]
        for index, each in enumerate(asked)
    ]


def _scores(task: Task, count: int, likelihoods: Sequence[Likelihood]) -> list[float]:
    """What the options are compared by."""
    if task.scorer == "uncond":
        pairs = zip(likelihoods[:count], likelihoods[count:], strict=True)
        return [given.total - without.total for given, without in pairs]
    if task.scorer == "per_token":
        return [each.total / len(each.token_nats) for each in likelihoods]
    return [each.total for each in likelihoods]


def _outcome(task: Task, index: int, asked: Asked, likelihoods: Sequence[Likelihood]) -> Outcome:
    question = asked.prompt.question
    count = len(question.options)
    scores = _scores(task, count, likelihoods)
    chosen = max(range(count), key=lambda option: (scores[option], -option))
    correct = _judged(task, question, chosen)
    num_cut = max(each.num_cut for each in asked.requests)
    options = []
    for option, text in enumerate(question.options):
        entry = {
            "text": text,
            "score": scores[option],
            "nats": likelihoods[option].total,
            "tokens": len(likelihoods[option].token_nats),
            "greedy": likelihoods[option].greedy,
        }
        if task.scorer == "uncond":
            entry["uncond_nats"] = likelihoods[count + option].total
        options.append(entry)
    record = {
        **about(asked.prompt, num_cut),
        "options": options,
        "gold": question.gold,
        "accepted": list(question.accepted),
        "chosen": chosen,
        "wanted_class": question.options[question.gold or 0],
        "found_class": question.options[chosen],
        **correct,
    }
    return Outcome(index, asked.prompt, record, correct, num_cut)


def _judged(task: Task, question: Question, chosen: int) -> dict[str, float]:
    """Every metric of one item that can be told from the item alone."""
    correct = {"accuracy": float(chosen in question.accepted)}
    right = [question.options[index] for index in question.accepted]
    for name in ("em", "f1"):
        if name in task.measured:
            correct[name] = text_metric(name, question.options[chosen], right, task.normalize)
    return correct


def about(prompt: Prompt, num_cut: int) -> dict[str, Any]:
    """What the record of an item holds whatever the kind of its task."""
    question = prompt.question
    return {
        "place": question.place,
        "key": question.key,
        "group": question.group,
        "by": list(question.by),
        "shots_fitted": prompt.shots,
        "cut_tokens": num_cut,
        "prompt_sha256": text_digest(prompt),
    }


def answer_nats(
    task: Task,
    prompts: Sequence[Prompt],
    model: Likelihoods,
    encoder: Encoder,
    advance: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Log-likelihood of the answer that demonstrations would show, in nats, for `perplexity`.

    Raises:
        DataError: an answer is longer than the window.
    """
    groups = []
    for prompt in prompts:
        pair = (prompt.contexts[0], task.delimiter + prompt.question.shown)
        made = scorable(encoder, [pair], model.window)
        if made is None:
            raise DataError(f"{prompt.question.place}: the answer is longer than the window")
        groups.append(made)
    return [found.total for (found,) in model.score(groups, advance)]


def text_digest(prompt: Prompt) -> str:
    """SHA-256 of everything a model is shown for one item."""
    digest = hashlib.sha256()
    endings = prompt.question.continuations or ("",) * len(prompt.contexts)
    for context, ending in zip(prompt.contexts, endings, strict=True):
        digest.update(f"{len(context)},{len(ending)}:{context}{ending}".encode("utf-8", "replace"))
    return digest.hexdigest()


def explain_choice(
    task: Task, name: str, shots: int, index: int, prompt: Prompt, model: Likelihoods, encoder: Any
) -> Explanation | None:
    """The exact texts and tokens of one item; None when it does not fit into the window."""
    asked = requests(task, prompt, encoder, model.window)
    if asked is None:
        return None
    (likelihoods,) = _likelihoods([asked], model, lambda items: None)
    outcome = _outcome(task, index, asked, likelihoods)
    question = prompt.question
    scores = _scores(task, len(question.options), likelihoods)
    scored = []
    for position, request in enumerate(asked.requests + asked.without):
        option = position % len(question.options)
        ids = request.ids[-request.num_scored :]
        pieces = [encoder.piece(token_id) for token_id in ids]
        nats = likelihoods[position].token_nats
        scored.append(
            Scored(
                context=encoder.decode(list(request.ids[1 : -request.num_scored])),
                text=question.continuations[option],
                tokens=tuple(zip(pieces, nats, strict=True)),
                score=scores[option]
                if position < len(question.options)
                else likelihoods[position].total,
                greedy=likelihoods[position].greedy,
            )
        )
    first = asked.requests[0]
    return Explanation(
        task=name,
        shots=shots,
        index=index,
        place=question.place,
        prompt_tokens=len(first.ids) - first.num_scored,
        shots_fitted=prompt.shots,
        num_cut=outcome.num_cut,
        scored=tuple(scored),
        chosen=question.options[outcome.record["chosen"]],
        wanted=tuple(question.options[index] for index in question.accepted),
        correct=outcome.correct,
    )
