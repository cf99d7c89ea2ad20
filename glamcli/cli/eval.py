"""`glam eval`: scores of a trained run, with everything needed to interpret them.

`glam eval RUN` is short for `glam eval score RUN`; the other subcommands have files of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli.eval_bias import cooccurrence, toxicity
from glamcli.cli.eval_data import data
from glamcli.cli.eval_overlap import overlap
from glamcli.cli.eval_report import report_items, report_results
from glamcli.cli.eval_show import show
from glamcli.cli.options import (
    Address,
    FileOrUrl,
    hosts_options,
    json_option,
    run_argument,
    strict_option,
)
from glamcli.cli.several import one_of_several, prepare_process
from glamcli.config.nearest import nearest
from glamcli.errors import RecipeError
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Silent

if TYPE_CHECKING:
    from glamcli.hosts.join import Host


class _RunOrCommand(click.Group):
    """The first word is a subcommand, or else a run to be scored (`./show` for one of that name).

    Its help is that of scoring, the usual meaning of `glam eval`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            near = nearest(args[0], self.commands, cutoff=0.7)
            if near and "/" not in args[0] and not os.path.exists(args[0]):
                hint = f"did you mean `glam eval {near}`?"
                raise RecipeError(f"no such command or run: `{args[0]}`", hint)
            args = ["score", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] RUN | COMMAND ...")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands["score"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=_RunOrCommand)
def command() -> None:
    """Score RUN, a run folder or a checkpoint, on a suite of tasks.

    Without --suite it answers questions about its own held-out documents. Results are kept in
    RUN/eval: one JSON file, and one line per item. A task that cannot be scored is reported, the
    others are scored, and the exit code is 3. After Ctrl-C the same command continues where it
    was. A model too large for one host is scored by the same command on several.
    """


for subcommand in (show, data, overlap, toxicity, cooccurrence):
    command.add_command(subcommand)


@command.command()
@run_argument
@click.option("--suite", default="quick", help="A suite or task: name or file.")
@click.option(
    "--shots",
    metavar="N,N,...",
    help="Numbers of demonstrations; `few` is the task's own.  [default: suite's]",
)
@click.option("--preset", default="glam", help="Conventions of prompts and scores: glam, gpt3, ...")
@click.option("--limit", type=click.IntRange(1), help="Only the first items of each task.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the demonstrations.")
@click.option("--data-dir", type=FileOrUrl(), help="Folder of the files that tasks name.")
@click.option(
    "--explain",
    metavar="[TASK:]N",
    help="Only item N (from 0), with its exact text and the scored tokens.",
)
@click.option(
    "--harness",
    metavar="TASK,...",
    help="Tasks of lm-eval instead of a suite; --shots then takes one number.",
)
@click.option(
    "--include-path", type=click.Path(path_type=Path), help="Folder of lm-eval task files."
)
@click.option("--fresh", is_flag=True, help="Discard what an interrupted evaluation has scored.")
@strict_option
@hosts_options
@json_option
def score(
    run: Path,
    address: Address,
    as_json: bool,
    suite: str,
    preset: str,
    shots: str | None,
    explain: str | None,
    harness: str | None,
    include_path: Path | None,
    fresh: bool,
    strict: bool,
    **options: Any,
) -> int:
    """Score RUN on a suite of tasks: the long form of `glam eval RUN`."""
    options["shots"], item = _shots(shots), _item(explain)
    chosen = load_suite(suite, preset)
    if harness is None and include_path is not None:
        raise RecipeError("--include-path is for the tasks of --harness")
    runtime = prepare_process(run)
    request = {"suite": harness or (chosen.name, chosen.sha256, preset), **options}
    with ExitStack() as stack:
        host, progress = stack.enter_context(one_of_several(address, run, runtime, as_json))
        lm_eval = None if harness is None else _import_lm_eval()  # it may be missing
        mine = {**request, "explain": explain, "harness": harness, "fresh": fresh, "strict": strict}
        _refuse_other_options(host, mine)
        from glamcli.evals.run import evaluate, resumable
        from glamcli.hosts.watchdog import LONG, make_watchdog
        from glamcli.trained import open_trained

        watchdog = stack.enter_context(make_watchdog(runtime, host))
        watchdog.beat("restoring", LONG)
        trained = open_trained(run, progress, host, strict=strict)
        progress = progress if host.is_first else Silent()
        if harness is None:
            options["between_batches"] = lambda: watchdog.beat("scoring", LONG)
            options["between_batches"]()
        if item is not None:
            results = evaluate(trained, chosen, progress=progress, explain=item, **options)
            return report_items(results, progress, as_json)
        with resumable(trained, request, progress, fresh=fresh) as journal:
            if harness is not None and lm_eval is not None:
                watchdog.rest()  # lm-eval does not say how far it is
                options.pop("data_dir")
                options |= {"tasks": harness.split(","), "include_path": include_path}
                return lm_eval.score_tasks(trained, journal, options, progress, as_json)
            results = evaluate(trained, chosen, progress=progress, journal=journal, **options)
            return report_results(results, trained, progress, as_json)


def _import_lm_eval() -> ModuleType:
    """The module for lm-eval. Raises: RecipeError where it is not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars; ours is one line
    from glamcli.cli import harness

    return harness


def _refuse_other_options(host: Host, mine: Mapping[str, Any]) -> None:
    """Refuses processes that were given other options; the data is compared by content."""
    from glamcli.train import identity

    options = {f"--{name}": value for name, value in mine.items() if name != "data_dir"}
    identity.refuse_differences(host, identity.of_command(host, options))


def _shots(text: str | None) -> tuple[int | str, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() or part == "few" for part in parts):
        raise RecipeError(f"--shots: expected numbers such as `0,1,5` or `few`, got `{text}`")
    return tuple(part if part == "few" else int(part) for part in parts)


def _item(text: str | None) -> tuple[str | None, int] | None:
    if text is None:
        return None
    task, _, number = text.rpartition(":")
    if not number.isdecimal():
        raise RecipeError(f"--explain: expected TASK:N such as `last_word:3`, got `{text}`")
    return task or None, int(number)
