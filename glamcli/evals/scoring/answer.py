"""Tasks with free answers: text is generated, in batches of prompts of similar length."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from glamcli.beam_search import Hypothesis
from glamcli.errors import DataError
from glamcli.evals.asking.prompts import Prompt
from glamcli.evals.asking.question import Question
from glamcli.evals.results.journal import Journal, inputs_digest
from glamcli.evals.results.scores import Scored
from glamcli.evals.scoring.choice import ItemResult
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.requests import make_requests
from glamcli.evals.scoring.shapes import Shape, plan_shapes, power_within, rounded
from glamcli.evals.scoring.text_metrics import normalized, text_metric
from glamcli.evals.tasks.schema import Task
from glamcli.generate import MIN_CACHE, Generator

_BATCH_ROWS = 32
_MIN_STEP = 8


def answer_freely(
    task: Task,
    prompts: Sequence[Prompt],
    generator: Generator,
    model: Likelihoods,
    advance: Callable[[int], None],
    journal: Journal,
) -> list[ItemResult]:
    """Results in the order of the prompts; `model` scores the wanted answers for `perplexity`.

    Raises:
        DataError: the prompt or the wanted answer of an item does not fit into the window.
    """
    requests = [_request(task, prompt, generator, model.window) for prompt in prompts]
    search = {
        "width": max(1, task.beam),
        "tokens": task.max_tokens,
        "alpha": task.length_alpha if task.beam > 1 else 0.0,
        "stop": task.stop,
    }
    inputs = [ids for ids, _ in requests]
    found = best_texts(inputs, search, generator, advance, journal)
    results = []
    for index, (prompt, (ids, num_cut), best) in enumerate(
        zip(prompts, requests, found, strict=True)
    ):
        prediction = best.text.strip()
        record = {
            "generated": prediction,
            "answers": list(prompt.question.answers),
            "nats": sum(best.token_nats),
            "tokens": len(best.ids),
            "ended": best.ended,
            "wanted_class": normalized(prompt.question.answers[0], task.normalize),
            "found_class": normalized(prediction, task.normalize),
            **_judged(task, prompt.question, prediction),
        }
        if "macro_f1" in task.measured and task.fixed_classes:
            classes = [normalized(each, task.normalize) for each in task.fixed_classes]
            record["classes"] = classes
        scored = partial(_scored, task, ids, best, generator.tokenizer)
        results.append(ItemResult(index, prompt, num_cut, record, len(ids), scored))
    if "perplexity" in task.measured:
        _add_answer_nats(task, results, model, generator.tokenizer)
    return results


def _scored(task: Task, ids: list[int], best: Hypothesis, tokenizer: Any) -> tuple[Scored, ...]:
    """The generated text, token by token."""
    pieces = [tokenizer.piece(token_id) for token_id in best.ids]
    tokens = tuple(zip(pieces, best.token_nats, strict=True))
    context = tokenizer.decode(ids[1:])
    return (Scored(context, best.text, tokens, best.score, greedy=task.beam <= 1),)


def _add_answer_nats(
    task: Task, results: Sequence[ItemResult], model: Likelihoods, encoder: Any
) -> None:
    """Adds to the records what `perplexity` reads: the log-likelihood in nats of the answer that
    demonstrations would show, and what it would be if every token were equally likely.

    Raises:
        DataError: an answer is longer than the window.
    """
    requests = []
    for result in results:
        question = result.prompt.question
        pair = (result.prompt.contexts[0], task.delimiter + question.shown)
        made = make_requests(encoder, [pair], model.window)
        if made is None:
            raise DataError(f"{question.place}: the answer is longer than the window")
        requests.append(made)
    for result, (found,) in zip(results, model.score(requests), strict=True):
        result.record["answer_nats"] = found.total
        result.record["uniform_nats"] = -len(found.token_nats) * math.log(model.vocab_size)


def _request(
    task: Task, prompt: Prompt, generator: Generator, window: int
) -> tuple[list[int], int]:
    """Ids of a prompt that leaves room for the answer, and how many tokens were cut off it.

    Trailing blanks are removed: the model generates them with the first word, as in its training.
    """
    room = window - task.max_tokens
    if room < 1:
        raise DataError(
            f"`max_tokens` {task.max_tokens} leaves no room for a prompt in rows of {window} tokens"
        )
    bos, *ids = generator.encode(prompt.contexts[0].rstrip(" "))
    cut = max(0, len(ids) - (room - 1))
    return [bos, *ids[cut:]], cut


def best_texts(
    prompts: Sequence[Sequence[int]],
    search: Mapping[str, Any],
    generator: Generator,
    advance: Callable[[int], None],
    journal: Journal,
) -> list[Hypothesis]:
    """The best text for each prompt; `search` is for `Generator.beams`.

    Prompts of similar length share a batch; batches in the journal are taken from it.
    """
    size = max(1, _BATCH_ROWS // search["width"])
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    rooms = _rooms([len(prompts[each[0]]) for each in batches], size, search["tokens"], generator)
    found: dict[int, Hypothesis] = {}
    for members, room in zip(batches, rooms, strict=True):
        batch = [prompts[index] for index in members]
        batch += [batch[-1]] * (size - len(batch))  # every batch has one shape
        key = inputs_digest([batch, search])
        known = journal.known.get(key)
        if known is None:
            best = [found[0] for found in generator.beams(batch, **search, room=room)]
            journal.add(key, {"best": [asdict(each) for each in best]})
        else:
            best = [
                Hypothesis(**each | {name: tuple(each[name]) for name in ("ids", "token_nats")})
                for each in known["best"]
            ]
        found |= dict(zip(members, best, strict=False))
        advance(len(members))
    return [found[index] for index in range(len(prompts))]


def _rooms(
    longest: Sequence[int], rows: int, new: int, generator: Generator
) -> list[tuple[int, int]]:
    """Tokens that each batch's prompts are padded to and positions of its cache: as few as they
    need, unless padding to a larger program in use costs less than compiling one more."""
    shapes = []
    for num in longest:
        # Padded by an eighth at most. Steps are compiled for the cache too, but take hardly
        # longer for more positions, so their sizes are further apart.
        step = max(_MIN_STEP, power_within(num) // 8)
        size = -(-num // step) * step
        shapes.append(Shape(0, 1, False, rows, size, rounded(size + new, MIN_CACHE)))
    known = {Shape(0, 1, False, *each) for each in generator.shapes if each[0] == rows}
    planned = plan_shapes(shapes, generator.compile_tokens // rows, known)
    generator.shapes |= {(rows, shape.length, shape.targets) for shape in planned}
    rooms = {index: shape[-2:] for shape, members in planned.items() for index in members}
    return [rooms[index] for index in range(len(longest))]


def _judged(task: Task, question: Question, prediction: str) -> dict[str, float]:
    """Every metric of one item that follows from the item alone."""
    found: Any = prediction
    if task.span_separator is not None and task.normalize == "drop":
        found = tuple(prediction.split(task.span_separator))
    texts = {"em", "f1"} & set(task.measured)
    if question.is_true is not None:
        texts.add("em")
    rules = {"references": task.references, "no_answer": task.no_answer}
    correct = {
        name: text_metric(name, found, question.references, task.normalize, **rules)
        for name in sorted(texts)
    }
    if question.is_true is not None:
        correct["accuracy"] = float((correct["em"] == 1) == question.is_true)
    return correct
