"""What `glam eval` and the end of `glam train` show: scores, where they are kept, what failed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from glamcli.cli import render
from glamcli.cli.eval_show import show_results
from glamcli.errors import DataError, printable
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.evals.results.scores import Explanation, Results, Scored
    from glamcli.trained import Trained

SHOWN_REASONS = 3


def report_results(results: Results, trained: Trained, progress: Progress, as_json: bool) -> int:
    """Shows scores, keeps them in the run folder and warns of what failed; the exit code."""
    from glamcli.evals.results.store import keep_results

    show_results(results, as_json)
    if trained.run_dir is not None and trained.host.is_first:
        keep_results(results, trained.run_dir, progress)
    return _failures(results, progress)


def report_items(results: Results, progress: Progress, as_json: bool) -> int:
    """Shows the explained items and warns of what failed; the exit code."""
    for each in results.explanations:
        if as_json:
            render.emit("explanation", **asdict(each))
        else:
            _show_item(each)
    return _failures(results, progress)


def _failures(results: Results, progress: Progress) -> int:
    """Warns about every task that was not scored; the exit code.

    Tasks without data are listed together: of the paper's 29, most users have few.
    """
    from glamcli.evals.tasks.items import MissingData
    from glamcli.evals.tasks.suites import shipped_suites

    absent = [each for each in results.failures if isinstance(each.error, MissingData)]
    if len(absent) > SHOWN_REASONS:
        names = ", ".join(dict.fromkeys(each.task for each in absent))
        suite = results.suite if results.suite in shipped_suites() else "SUITE"
        progress.warn(
            f"tasks without data were not scored: {names} (`glam eval data {suite}` says what is"
            " missing and where it comes from; `--data-dir` names another folder)"
        )
    for failure in results.failures:
        if failure in absent and len(absent) > SHOWN_REASONS:
            continue
        shots = "" if failure.setting is None else f" at {failure.setting} shots"
        hint = f" ({failure.error.hint})" if failure.error.hint else ""
        progress.warn(f"task `{failure.task}` was not scored{shots}: {failure.error.what}{hint}")
    skipped = {(score.task, score.skipped) for score in results.scores if score.skipped}
    for task, reasons in sorted(skipped):
        shown = "; ".join(reasons[:SHOWN_REASONS])
        more = len(reasons) - SHOWN_REASONS
        progress.warn(
            f"task `{task}`: skipped {len(reasons)} items: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return DataError.exit_code if results.failures else 0


def _show_item(item: Explanation) -> None:
    """The exact text that the model read, and the scores of its tokens."""
    cut = f", {item.num_cut} tokens cut from its beginning" if item.num_cut else ""
    _say(f"{item.task} item {item.index} ({item.place}), {item.shots} shots")
    _say(
        f"context: {item.prompt_tokens} tokens with BOS, "
        f"{item.shots_fitted} demonstrations fitted{cut}"
    )
    shown: str | None = None
    for scored in item.scored:
        if scored.context != shown:
            shown = scored.context
            _say("\n".join(f"  | {line}" for line in shown.split("\n")))
        _say(_tokens(scored))
    correct = ", ".join(f"{name} {value:.2f}" for name, value in item.correct.items())
    _say(f"answer:   {item.chosen}")
    _say(f"expected: {' | '.join(item.wanted)}")
    _say(f"{correct}\n")


def _tokens(scored: Scored) -> str:
    tokens = "  ".join(f"{json.dumps(p, ensure_ascii=False)} {n:.3f}" for p, n in scored.tokens)
    total = sum(nats for _, nats in scored.tokens)
    greedy = ", what greedy decoding would say" if scored.greedy else ""
    text = json.dumps(scored.text, ensure_ascii=False)
    return (
        f"{text}\n    score {scored.score:.4f}, sum {total:.4f} nats over "
        f"{len(scored.tokens)} tokens{greedy}\n    {tokens}"
    )


def _say(text: str) -> None:
    click.echo(printable(text))
