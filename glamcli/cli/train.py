"""`glam train`: train a recipe, or resume it; then show what the model scores and writes."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glamcli import faults, hugepages
from glamcli.cli import render
from glamcli.cli.main import STARTED
from glamcli.cli.options import (
    Address,
    RunFolder,
    hosts_options,
    json_option,
    set_option,
    strict_option,
)
from glamcli.cli.several import one_of_several
from glamcli.config.files import run_folder
from glamcli.config.load import load_recipe
from glamcli.config.origins import origins_to_note
from glamcli.config.schema import Finish
from glamcli.config.settings import first_and_last
from glamcli.errors import DataError, GlamError, printable
from glamcli.evals.tasks.suites import check_suites
from glamcli.progress import Progress, Silent

if TYPE_CHECKING:
    from glamcli.train.loop import Outcome
    from glamcli.trained import Trained


def _is_span(ctx: click.Context, param: click.Parameter, steps: str | None) -> str | None:
    """Raises: click.BadParameter for what is not `FIRST:LAST`."""
    try:
        if steps is not None:
            first_and_last(steps)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    return steps


@click.command()
@click.argument("recipe")
@set_option
@click.option(
    "--run",
    "run_dir",
    type=RunFolder(file_okay=False),
    help="Folder of the run.  [default: runs/<recipe>, or RECIPE where that is a run]",
)
@click.option("--fresh", is_flag=True, help="Start over; an earlier run in the folder is renamed.")
@strict_option
@click.option(
    "--profile",
    metavar="FIRST:LAST",
    callback=_is_span,
    help="Trace these steps for xprof and TensorBoard, into RUN/profile (every.profile_steps).",
)
@click.option(
    "--allow-faults",
    is_flag=True,
    help=f"Rehearsal: let {faults.VARIABLE}=kind@step break the run (docs/reliability.md).",
)
@hosts_options
@json_option
def command(
    recipe: str,
    sets: tuple[str, ...],
    run_dir: Path | None,
    fresh: bool,
    strict: bool,
    profile: str | None,
    allow_faults: bool,
    address: Address,
    as_json: bool,
) -> int:
    """Train RECIPE, a shipped name or a file, and keep everything in a run folder.

    The same command resumes the run where it stopped, and so does `glam train runs/NAME`. Ctrl-C,
    SIGTERM and closing the terminal save at the next step and exit with 75; a second signal exits
    at once. At the end the model is scored on held-out text and, when the recipe has a `finish`
    section, on a suite of tasks. On several hosts, start the same command on each of them.
    """
    traced = () if profile is None else (f"every.profile_steps={profile}",)
    loaded = load_recipe(recipe, (*sets, *traced))
    breaking = os.environ.get(faults.VARIABLE, "")
    requested = faults.requested(breaking, allow_faults)
    # XLA's own warnings are for those who work on it; set to 0 from outside, they are shown.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    hugepages.apply(loaded.recipe.runtime.huge_pages == "auto")
    folder = run_dir or run_folder(loaded.run_dir)
    check_suites(loaded.recipe)
    with one_of_several(address, folder, loaded.recipe.runtime, as_json) as (host, progress):
        from glamcli.evals.scheduled import score_during
        from glamcli.train.folder import set_aside
        from glamcli.train.identity import refuse_differences
        from glamcli.train.loop import train
        from glamcli.trained import keep_compiled_programs

        keep_compiled_programs(loaded.recipe)
        refuse_differences(host, {faults.VARIABLE: breaking})
        faults.arm(requested, host.index)
        if requested and host.is_first:
            progress.warn(f"{faults.VARIABLE}={breaking}: this run is broken on purpose")
        if fresh and host.is_first and (aside := set_aside(folder, progress)) is not None:
            progress.say(f"the earlier run is now {aside}")
        with loaded.placing():
            about = (score_during, strict, STARTED, origins_to_note(loaded))
            outcome = train(loaded.recipe, folder, progress, host, *about)
        progress = progress if host.is_first else Silent()
        finish = loaded.recipe.finish
        again = _longer(recipe, sets, 2 * outcome.step)
        again += ["--run", str(folder)] if run_dir else []
        saved = f"the model is trained and saved: `{shlex.join(_eval_words(folder, finish.suite))}`"
        try:
            code = _conclude(outcome, folder, progress, as_json)
            _suggest(folder, finish, again, outcome, as_json)
        except KeyboardInterrupt:
            progress.say(f"{saved} scores it")
            raise
        except OSError as error:
            error.add_note(f"{saved} scores it")
            raise
        return code


def _conclude(outcome: Outcome, folder: Path, progress: Progress, as_json: bool) -> int:
    """Shows how the run ended and what its model scores and writes; the exit code."""
    if outcome.model is None:
        progress.say(f"{folder} is finished: step {outcome.step}, nothing left to do")
        return 0
    _show_heldout(outcome, as_json)
    code = _finish(outcome.model.at(folder), progress, as_json)
    if outcome.failed_evals:
        progress.warn(f"{outcome.failed_evals} evaluations during training failed")
        code = code or DataError.exit_code
    return code


def _show_heldout(outcome: Outcome, as_json: bool) -> None:
    """Loss per source beside what frequencies alone would reach; nothing if nothing was scored."""
    if not outcome.heldout_nats:
        return
    if as_json:
        render.emit("heldout", nats=outcome.heldout_nats, unigram_nats=outcome.unigram_nats)
        return
    click.echo()
    render.print_table(
        ("source", ">held-out loss", ">unigram entropy"),
        [
            [name, f"{nats:.3f}", f"{outcome.unigram_nats[name]:.3f}"]
            for name, nats in outcome.heldout_nats.items()
        ],
        title=f"held-out text after step {outcome.step} (nats per token, lower is better)",
        note="unigram entropy: the best possible without looking at the context",
    )


def _finish(trained: Trained, progress: Progress, as_json: bool) -> int:
    """The suite and the sample that the recipe asks for; the exit code.

    A failure here is reported and undoes nothing: the model is trained and saved.
    """
    from glamcli.cli.eval_report import report_results
    from glamcli.decoding import Sampling
    from glamcli.evals import run
    from glamcli.evals.tasks.suites import load_suite

    code = 0
    finish = trained.recipe.finish
    try:
        if finish.suite is not None:
            suite = load_suite(finish.suite)
            results = run.evaluate(trained, suite, progress=progress, shots=finish.shots)
            if not as_json:
                click.echo()
            code = report_results(results, trained, progress, as_json)
    except GlamError as error:
        progress.warn(f"suite `{finish.suite}` was not scored: {error.what}")
        code = error.exit_code
    try:
        if (prompt := finish.prompt) is not None:
            how = Sampling(temperature=0.6, top_p=0.95)
            (text,) = trained.generator.texts(prompt, how, tokens=finish.sample_tokens)
            if as_json:
                render.emit("sample", prompt=prompt, text=text)
            else:
                click.echo()
                render.sample(prompt, text)
    except GlamError as error:
        progress.warn(f"no sample: {error.what}")
        code = code or error.exit_code
    return code


def _suggest(
    folder: Path, finish: Finish, again: list[str], outcome: Outcome, as_json: bool
) -> None:
    """What to do next, ready to paste; `again` trains the same run for twice as long."""
    if as_json:
        render.emit("done", run=str(folder), step=outcome.step)
        return
    commands = (
        ["glam", "generate", str(folder), finish.prompt or "Once upon a time"],
        _eval_words(folder, finish.suite),
        again,
    )
    click.echo("\nnext:")
    for words in commands:
        click.echo(printable(f"  {shlex.join(words)}"))


def _longer(recipe: str, sets: tuple[str, ...], steps: int) -> list[str]:
    kept = [each for each in sets if not each.startswith("train.steps=")]
    words = [word for each in (*kept, f"train.steps={steps}") for word in ("--set", each)]
    return ["glam", "train", recipe, *words]


def _eval_words(folder: Path, suite: str | None) -> list[str]:
    return ["glam", "eval", str(folder), "--suite", suite or "quick"]
