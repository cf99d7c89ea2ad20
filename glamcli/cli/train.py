"""`glam train`: train a recipe, or go on where it stopped; then say what the model can do."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli import hugepages
from glamcli.cli import render
from glamcli.cli.options import hosts_options, json_option, set_option
from glamcli.cli.several import one_of_several
from glamcli.config.load import load_recipe
from glamcli.config.schema import Recipe
from glamcli.errors import CheckpointError, DataError, GlamError
from glamcli.progress import Progress, Silent
from glamcli.trained import keep_compiled_programs

if TYPE_CHECKING:
    from glamcli.evals.run import Subject
    from glamcli.hosts.join import Host
    from glamcli.train.loop import Model, Outcome


@click.command()
@click.argument("recipe")
@set_option
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run.  [default: runs/<recipe>]",
)
@click.option("--fresh", is_flag=True, help="Start anew; an earlier run in the folder is renamed.")
@hosts_options
@json_option
def command(
    recipe: str,
    sets: tuple[str, ...],
    run_dir: Path | None,
    fresh: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    as_json: bool,
) -> int:
    """Train RECIPE, a shipped name or a file, and keep everything in a run folder.

    The same command goes on where the run stopped. Ctrl-C (or SIGTERM) saves at the next step and
    exits with 75; a second one leaves at once. At the end the model is scored on held-out text
    and, when the recipe has a `finish` section, on a suite of tasks. On several hosts, start the
    same command on each of them.
    """
    loaded = load_recipe(recipe, sets)
    # XLA's own warnings are for those who work on it; set to 0 from outside, they are shown.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    hugepages.apply(loaded.recipe.runtime.huge_pages == "auto")
    folder = run_dir or Path("runs") / loaded.name
    _refuse_bad_suites(loaded.recipe)
    with one_of_several(coordinator, num_processes, process_id, loaded.recipe.runtime, as_json) as (
        host,
        progress,
    ):
        keep_compiled_programs(loaded.recipe)
        if fresh and host.is_first:
            _set_aside(folder, progress)
        from glamcli.train.loop import train

        scoring = Scoring(loaded.recipe, folder, host)
        with loaded.placing():
            outcome = train(loaded.recipe, folder, progress, host, scoring.during)
        progress = progress if host.is_first else Silent()
        code = _conclude(outcome, scoring, progress, as_json)
        again = ["glam", "train", recipe]
        again += [p for each in sets if not _is_length(each) for p in ("--set", each)]
        again += ["--set", f"train.steps={2 * outcome.step}"]
        again += ["--run", str(folder)] if run_dir else []
        _suggest(scoring, again, outcome, as_json)
        return code


def _is_length(assignment: str) -> bool:
    return assignment.startswith("train.steps=")


def _conclude(outcome: Outcome, scoring: Scoring, progress: Progress, as_json: bool) -> int:
    """Says what came of it and asks the model what the recipe wants to know; the exit code."""
    folder = scoring.folder
    if outcome.model is None:
        progress.say(f"{folder} is finished: step {outcome.step}, nothing left to do")
        code = 0
    else:
        _show_heldout(outcome, as_json)
        try:
            code = _finish(outcome.model, scoring, progress, as_json)
        except KeyboardInterrupt:
            scores = shlex.join(_eval_words(folder, scoring.recipe.finish.suite))
            progress.say(f"the model is trained and saved: `{scores}` scores it")
            raise
        if outcome.failed_evals:
            progress.warn(f"{outcome.failed_evals} evaluations during training failed")
            code = code or DataError.exit_code
    return code


def _refuse_bad_suites(recipe: Recipe) -> None:
    """Reads the suites now: a mistake in one should not be found out after hours."""
    from glamcli.evals.tasks.suites import load_suite

    during = recipe.eval.suite if recipe.every.eval_steps is not None else None
    for suite in (during, recipe.finish.suite):
        for task in () if suite is None else load_suite(suite).tasks:
            if task.error is not None:
                raise task.error


def _set_aside(folder: Path, progress: Progress) -> None:
    """Renames an earlier run to `<run>.1`, `<run>.2`, ...: nothing is ever deleted."""
    from glamcli.hosts.lock import locked

    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    with locked(folder):
        pass  # nobody is using it
    try:
        folder.rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot rename {folder}: {error.strerror or error}") from error
    progress.say(f"the earlier run is now {target}")


def _show_heldout(outcome: Outcome, as_json: bool) -> None:
    """Loss per source beside what frequencies alone would reach; nothing if nothing was scored."""
    if not outcome.heldout_nats:
        return
    if as_json:
        _emit("heldout", nats=outcome.heldout_nats, unigram_nats=outcome.unigram_nats)
        return
    click.echo()
    render.table(
        ("source", ">held-out loss", ">unigram entropy"),
        [
            [name, f"{nats:.3f}", f"{outcome.unigram_nats[name]:.3f}"]
            for name, nats in outcome.heldout_nats.items()
        ],
        title=f"held-out text after step {outcome.step} (nats per token, lower is better)",
        note="unigram entropy: the best possible without looking at the context",
    )


class Scoring:
    """Scores the growing model of a run and the finished one, with the same programs."""

    def __init__(self, recipe: Recipe, folder: Path, host: Host):
        self.recipe = recipe
        self.folder = folder
        self.host = host
        self._subject: Subject | None = None

    def during(self, model: Model, progress: Progress) -> dict[str, float]:
        """Scores of the recipe's `eval` section by name, for the metrics of the run."""
        from glamcli.evals.run import evaluate
        from glamcli.evals.tasks.suites import load_suite

        asked = self.recipe.eval
        results = evaluate(
            self._renewed(model),
            load_suite(asked.suite),
            progress=progress,
            shots=asked.shots,
            limit=asked.limit,
        )
        for failure in results.failures:
            progress.warn(f"task `{failure.task}` was not scored: {failure.error.what}")
        return results.curves()

    def finished(self, model: Model, progress: Progress, as_json: bool) -> int:
        """The suite of the recipe's `finish` section, shown and kept; the exit code."""
        from glamcli.cli.eval_tell import tell
        from glamcli.evals.run import evaluate
        from glamcli.evals.tasks.suites import load_suite

        finish = self.recipe.finish
        subject, suite = self._renewed(model), load_suite(finish.suite or "")
        results = evaluate(subject, suite, progress=progress, shots=finish.shots)
        if not as_json:
            click.echo()
        return tell(results, self.folder if self.host.is_first else None, progress, as_json)

    def _renewed(self, model: Model) -> Subject:
        identity = {"run": str(self.folder), **model.identity}
        if self._subject is None:
            self._subject = _subject(model, identity, self.host)
        else:
            self._subject.renew(model.params, identity)
        return self._subject


def _subject(model: Model, identity: dict[str, Any], host: Host) -> Subject:
    from glamcli.evals.run import Subject

    prepared = model.dataset.prepared
    return Subject(
        decoder=model.decoder,
        params=model.params,
        tokenizer=model.dataset.tokenizer,
        window=model.row_tokens,
        identity=identity,
        documents=lambda: {
            name: prepared.heldout_documents(name) for name in model.dataset.source_names
        },
        host=host,
    )


def _finish(model: Model, scoring: Scoring, progress: Progress, as_json: bool) -> int:
    """The suite and the sample that the recipe asks for; the exit code.

    A failure here is told and undoes nothing: the model is trained and saved.
    """
    code = 0
    finish = scoring.recipe.finish
    if finish.suite is not None:
        try:
            code = scoring.finished(model, progress, as_json)
        except GlamError as error:
            progress.warn(f"suite `{finish.suite}` was not scored: {error.what}")
            code = error.exit_code
    if finish.prompt is not None:
        try:
            _sample(model, finish.prompt, finish.sample_tokens, as_json)
        except GlamError as error:
            progress.warn(f"no sample: {error.what}")
            code = code or error.exit_code
    return code


def _sample(model: Model, prompt: str, tokens: int, as_json: bool) -> None:
    from glamcli.generate import Generator, Sampling

    moe = model.decoder.moe
    generator = Generator(
        model.decoder,
        model.params,
        model.dataset.tokenizer,
        dispatch=None if moe is None else moe.eval_dispatch,
    )
    text = generator.texts(prompt, Sampling(temperature=0.6, top_p=0.95), tokens=tokens)[0]
    if as_json:
        _emit("sample", prompt=prompt, text=text)
        return
    click.echo()
    render.sample(prompt, text)


def _suggest(scoring: Scoring, again: list[str], outcome: Outcome, as_json: bool) -> None:
    """What to do next, ready to paste; `again` trains the same run for twice as long."""
    if as_json:
        _emit("done", run=str(scoring.folder), step=outcome.step)
        return
    finish = scoring.recipe.finish
    commands = (
        ["glam", "generate", str(scoring.folder), finish.prompt or "Once upon a time"],
        _eval_words(scoring.folder, finish.suite),
        again,
    )
    click.echo("\nnext:")
    for words in commands:
        click.echo(f"  {shlex.join(words)}")


def _eval_words(folder: Path, suite: str | None) -> list[str]:
    return ["glam", "eval", str(folder), "--suite", suite or "quick"]


def _emit(event: str, **values: object) -> None:
    click.echo(json.dumps({"event": event, **values}))
