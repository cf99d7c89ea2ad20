"""Tasks with options: log-likelihoods of the options, and the one the model prefers."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from glamcli.data.tokenizer import Tokenizer
from glamcli.evals.asking.prompts import Prompt
from glamcli.evals.asking.question import Question
from glamcli.evals.results.scores import Explanation, Scored
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.requests import Likelihood, Request, make_requests
from glamcli.evals.scoring.text_metrics import text_metric
from glamcli.evals.tasks.schema import Task


@dataclass(frozen=True)
class ItemResult:
    """One item after scoring."""

    index: int
    prompt: Prompt
    num_cut: int
    """tokens cut from its own beginning."""
    record: dict[str, Any]
    """what the kind of task adds to the line of the items file."""
    prompt_tokens: int
    scored: Callable[[], tuple[Scored, ...]]
    """the texts that were scored (every option, then the denominators of `uncond`) or generated,
    token by token."""

    def explanation(self, task: str, shots: int, index: int) -> Explanation:
        """The exact prompt of the item, and what the model made of it."""
        question, record = self.prompt.question, self.record
        best = record.get("tied") or [each for each in [record.get("chosen")] if each is not None]
        return Explanation(
            task=task,
            shots=shots,
            index=index,
            place=question.place,
            prompt_tokens=self.prompt_tokens,
            shots_fitted=self.prompt.shots,
            num_cut=self.num_cut,
            scored=self.scored(),
            chosen=record.get("generated", " = ".join(question.options[each] for each in best)),
            wanted=question.answers or tuple(question.options[i] for i in question.accepted),
            correct={name: record[name] for name in ("accuracy", "em", "f1") if name in record},
        )


_Requests = tuple[list[Request], list[Request]]
"""One item: its options, and for `uncond` the same behind the context of the denominator."""


def answer_choices(
    task: Task,
    prompts: Sequence[Prompt],
    model: Likelihoods,
    encoder: Tokenizer,
    advance: Callable[[int], None],
) -> tuple[list[ItemResult], list[str]]:
    """Results in the order of the prompts, and items skipped with the reason."""
    skipped: list[str] = []
    asked: dict[int, _Requests] = {}
    for index, prompt in enumerate(prompts):
        continuations = prompt.question.continuations
        pairs = list(zip(prompt.contexts, continuations, strict=True))
        options, without = make_requests(encoder, pairs, model.window), []
        if task.scorer == "uncond":
            pairs = [(task.uncond_context, each) for each in continuations]
            without = make_requests(encoder, pairs, model.window)
        if options is None or without is None:
            skipped.append(f"{prompt.question.place}: an option is longer than the window")
        else:
            asked[index] = options, without
    found = _likelihoods([*asked.values()], model, advance)
    results = [
        _result(task, index, prompts[index], made, likelihoods, encoder)
        for (index, made), likelihoods in zip(asked.items(), found, strict=True)
    ]
    return results, skipped


def _likelihoods(
    asked: Sequence[_Requests], model: Likelihoods, advance: Callable[[int], None]
) -> list[list[Likelihood]]:
    """Likelihoods of the options and denominators of each item. `advance` counts items."""
    # Denominators of `uncond` recur, with the same options and at every number of shots.
    known = model.remembered
    new = dict.fromkeys(request for _, without in asked for request in without)
    alone = [request for request in new if request not in known]
    groups = [options for options, _ in asked] + [[request] for request in alone]
    total = sum(len(group) for group in groups)
    done = 0

    def some_done(count: int) -> None:
        nonlocal done
        shown, done = done * len(asked) // total, done + count
        advance(done * len(asked) // total - shown)

    scored = model.score(groups, some_done)
    known.update(
        (request, one) for request, (one,) in zip(alone, scored[len(asked) :], strict=True)
    )
    found = []
    for (options, without), likelihoods in zip(asked, scored, strict=False):
        # Equal requests tie exactly, whichever row of a batch each of them was in.
        same = dict(zip(options[::-1], likelihoods[::-1], strict=True))
        found.append([same[each] for each in options] + [known[each] for each in without])
    return found


def _scores(task: Task, count: int, likelihoods: Sequence[Likelihood]) -> list[float]:
    """What the options are compared by."""
    if task.scorer == "uncond":
        pairs = zip(likelihoods[:count], likelihoods[count:], strict=True)
        return [given.total - without.total for given, without in pairs]
    if task.scorer == "per_token":
        return [each.total / len(each.token_nats) for each in likelihoods]
    return [each.total for each in likelihoods]


def _result(
    task: Task,
    index: int,
    prompt: Prompt,
    asked: _Requests,
    likelihoods: Sequence[Likelihood],
    encoder: Tokenizer,
) -> ItemResult:
    question = prompt.question
    count = len(question.options)
    scores = _scores(task, count, likelihoods)
    best = _best_options(scores)
    options = [
        {
            "text": text,
            "score": score,
            "nats": found.total,
            "tokens": len(found.token_nats),
            "greedy": found.greedy,
        }
        for text, score, found in zip(question.options, scores, likelihoods, strict=False)
    ]
    for option, found in zip(options, likelihoods[count:], strict=False):
        option["uncond_nats"] = found.total
    record = {
        "options": options,
        "gold": question.gold,
        "accepted": list(question.accepted),
        "chosen": best[0] if best else None,
        "wanted_class": question.options[question.gold or 0],
        "found_class": question.options[best[0]] if best else None,
        **_judged(task, question, best),
    }
    if len(best) > 1:
        record["tied"] = list(best)
    if "macro_f1" in task.measured and task.fixed_classes:
        record["classes"] = list(task.fixed_classes)

    def scored() -> tuple[Scored, ...]:
        made = []
        for position, (request, found) in enumerate(
            zip(itertools.chain(*asked), likelihoods, strict=True)
        ):
            pieces = [encoder.piece(token_id) for token_id in request.ids[-request.num_scored :]]
            context = encoder.decode(list(request.ids[1 : -request.num_scored]))
            text = question.continuations[position % count]
            score = scores[position] if position < count else found.total
            tokens = tuple(zip(pieces, found.token_nats, strict=True))
            made.append(Scored(context, text, tokens, score, found.greedy))
        return tuple(made)

    first = asked[0][0]
    num_cut = max(each.num_cut for each in asked[0])
    return ItemResult(index, prompt, num_cut, record, len(first.ids) - first.num_scored, scored)


def _best_options(scores: Sequence[float]) -> tuple[int, ...]:
    """The options of the highest score: several where they tie exactly, none beside a NaN."""
    if any(math.isnan(score) for score in scores):
        return ()
    highest = max(scores)
    return tuple(option for option, score in enumerate(scores) if score == highest)


def _judged(task: Task, question: Question, best: Sequence[int]) -> dict[str, float]:
    """Every metric of one item that follows from the item alone; means over options that tie."""
    right = [question.options[index] for index in question.accepted]
    correct = {"accuracy": [float(option in question.accepted) for option in best]}
    for name in ("em", "f1"):
        if name in task.measured:
            texts = [question.options[option] for option in best]
            correct[name] = [text_metric(name, text, right, task.normalize) for text in texts]
    return {name: sum(values) / max(len(values), 1) for name, values in correct.items()}
