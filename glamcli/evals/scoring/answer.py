"""Tasks with free answers: text is generated, in batches of prompts of similar length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from glamcli.beam_search import Hypothesis
from glamcli.errors import DataError
from glamcli.evals.asking.prompts import Prompt
from glamcli.evals.asking.question import Question
from glamcli.evals.results.journal import Journal, digest
from glamcli.evals.results.scores import Explanation, Scored
from glamcli.evals.scoring.batches import Kind, plan, power_within, rounded
from glamcli.evals.scoring.choice import Outcome, about
from glamcli.evals.scoring.text_metrics import normalized, text_metric
from glamcli.evals.tasks.schema import Task
from glamcli.generate import MIN_CACHE, Generator

BATCH_ROWS = 32
MIN_STEP = 8


def answer_freely(
    task: Task,
    prompts: Sequence[Prompt],
    generator: Generator,
    window: int,
    advance: Callable[[int], None],
    journal: Journal | None = None,
) -> list[Outcome]:
    """Outcomes in the order of the prompts."""
    requests = [request(task, prompt, generator, window) for prompt in prompts]
    found = _generate(task, [ids for ids, _ in requests], generator, advance, journal)
    outcomes = []
    for index, (prompt, hypothesis) in enumerate(zip(prompts, found, strict=True)):
        prediction, correct = _judge(task, prompt, hypothesis)
        record = {
            **about(prompt, requests[index][1]),
            "generated": prediction,
            "answers": list(prompt.question.answers),
            "nats": sum(hypothesis.token_nats),
            "tokens": len(hypothesis.ids),
            "ended": hypothesis.ended,
            "wanted_class": normalized(prompt.question.answers[0], task.normalize),
            "found_class": normalized(prediction, task.normalize),
            **correct,
        }
        outcomes.append(Outcome(index, prompt, record, correct, requests[index][1]))
    return outcomes


def request(task: Task, prompt: Prompt, generator: Generator, window: int) -> tuple[list[int], int]:
    """Ids of a prompt that leaves room for the answer, and how many tokens were cut off it.

    Trailing blanks go: the model says them with the first word, as everywhere in its text.
    """
    room = window - task.max_tokens
    if room < 1:
        raise DataError(
            f"`max_tokens` {task.max_tokens} leaves no room for a prompt in rows of {window} tokens"
        )
    bos, *ids = generator.encode(prompt.contexts[0].rstrip(" "))
    cut = max(0, len(ids) - (room - 1))
    return [bos, *ids[cut:]], cut


def _generate(
    task: Task,
    prompts: Sequence[Sequence[int]],
    generator: Generator,
    advance: Callable[[int], None],
    journal: Journal | None = None,
) -> list[Hypothesis]:
    """The best text for each prompt, as the task has it."""
    search = {
        "width": max(1, task.beam),
        "tokens": task.max_tokens,
        "alpha": task.length_alpha if task.beam > 1 else 0.0,
        "stop": task.stop,
    }
    return best_texts(prompts, search, generator, advance, journal or Journal())


def best_texts(
    prompts: Sequence[Sequence[int]],
    search: Mapping[str, Any],
    generator: Generator,
    advance: Callable[[int], None],
    journal: Journal,
) -> list[Hypothesis]:
    """The best text for each prompt; `search` is for `Generator.beams`.

    Prompts of similar length share a batch; batches that the journal knows are taken from it.
    """
    size = max(1, BATCH_ROWS // search["width"])
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    rooms = _rooms([len(prompts[each[0]]) for each in batches], size, search["tokens"], generator)
    found: dict[int, Hypothesis] = {}
    for members, room in zip(batches, rooms, strict=True):
        batch = [prompts[index] for index in members]
        batch += [batch[-1]] * (size - len(batch))  # every batch has one shape
        key = digest([batch, search])
        known = journal.get(key)
        if known is None:
            best = [found[0] for found in generator.beams(batch, **search, room=room)]
            journal.add(key, {"best": [asdict(each) for each in best]})
        else:
            best = [_hypothesis(each) for each in known["best"]]
        found |= dict(zip(members, best, strict=False))
        advance(len(members))
    return [found[index] for index in range(len(prompts))]


def _rooms(
    longest: Sequence[int], rows: int, new: int, generator: Generator
) -> list[tuple[int, int]]:
    """Tokens that each batch's prompts are padded to and places of its cache: as few as they need,
    unless padding to a larger program in use costs less than compiling one more."""
    shapes = [(rows, *_room(each, new)) for each in longest]
    known = {shape for shape in generator.shapes if shape[0] == rows}
    buckets = plan(shapes, Kind(), generator.compile_tokens // rows, known)
    generator.shapes |= {bucket.shape for bucket in buckets}
    rooms = {index: bucket.shape[1:] for bucket in buckets for index in bucket.members}
    return [rooms[index] for index in range(len(longest))]


def _room(longest: int, new: int) -> tuple[int, int]:
    """A prompt is padded by an eighth at most. Steps are compiled for the cache too, but take
    hardly longer for more places, so their sizes are further apart."""
    step = max(MIN_STEP, power_within(longest) // 8)
    size = -(-longest // step) * step
    return size, rounded(size + new, MIN_CACHE)


def _hypothesis(kept: Mapping[str, Any]) -> Hypothesis:
    """A hypothesis out of the journal, which knows lists only."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()
    }
    return Hypothesis(**values)


def rules(task: Task) -> dict[str, Any]:
    """How texts of a task are compared, for `text_metric`."""
    return {"references": task.references, "no_answer": task.no_answer}


def _judge(task: Task, prompt: Prompt, hypothesis: Hypothesis) -> tuple[str, dict[str, float]]:
    prediction = hypothesis.text.strip()
    return prediction, _judged(task, prompt.question, prediction)


def _judged(task: Task, question: Question, prediction: str) -> dict[str, float]:
    """Every metric of one item that can be told from the item alone."""
    found: Any = prediction
    if task.span_separator is not None and task.normalize == "drop":
        found = tuple(prediction.split(task.span_separator))
    texts = {"em", "f1"} & set(task.measured)
    if question.is_true is not None:
        texts.add("em")
    correct = {
        name: text_metric(name, found, question.references, task.normalize, **rules(task))
        for name in sorted(texts)
    }
    if question.is_true is not None:
        correct["accuracy"] = float((correct["em"] == 1) == question.is_true)
    return correct


def explain_answer(
    task: Task,
    name: str,
    shots: int,
    index: int,
    prompt: Prompt,
    generator: Generator,
    window: int,
) -> Explanation:
    """The exact prompt of one item and the generated tokens."""
    ids, cut = request(task, prompt, generator, window)
    (best,) = _generate(task, [ids], generator, lambda count: None)
    prediction, correct = _judge(task, prompt, best)
    tokenizer: Any = generator.tokenizer
    pieces = [tokenizer.piece(token_id) for token_id in best.ids]
    scored = Scored(
        context=tokenizer.decode(ids[1:]),
        text=best.text,
        tokens=tuple(zip(pieces, best.token_nats, strict=True)),
        score=best.score,
        greedy=task.beam <= 1,
    )
    return Explanation(
        task=name,
        shots=shots,
        index=index,
        place=prompt.question.place,
        prompt_tokens=len(ids),
        shots_fitted=prompt.shots,
        num_cut=cut,
        scored=(scored,),
        chosen=prediction,
        wanted=prompt.question.answers,
        correct=correct,
    )
