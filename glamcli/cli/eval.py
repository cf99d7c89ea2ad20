"""`glam eval`: scores of a trained run, with everything that says what they mean.

`glam eval RUN` is short for `glam eval score RUN`; the other subcommands have files of their own.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli.eval_bias import cooccurrence, toxicity
from glamcli.cli.eval_data import data
from glamcli.cli.eval_overlap import overlap
from glamcli.cli.eval_show import show
from glamcli.cli.eval_tell import tell, tell_items
from glamcli.cli.options import hosts_options, json_option
from glamcli.cli.several import one_of_several, prepare_process
from glamcli.errors import RecipeError
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Progress, Silent

if TYPE_CHECKING:
    from glamcli.evals.results.journal import Journal
    from glamcli.hosts.join import Host


class _RunOrCommand(click.Group):
    """The first word is a subcommand, or else a run to be scored (`./show` for one of that name).

    Its help is that of scoring, which is what people mean by `glam eval`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            self._refuse_typo(args[0])
            args = ["score", *args]
        return super().parse_args(ctx, args)

    def _refuse_typo(self, word: str) -> None:
        near = difflib.get_close_matches(word, self.commands, 1, cutoff=0.7)
        if near and "/" not in word and not Path(word).exists():
            raise RecipeError(
                f"no such command or run: `{word}`", hint=f"did you mean `glam eval {near[0]}`?"
            )

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
    others go on, and the exit code tells. After Ctrl-C the same command goes on where it was. A
    model too large for one host is scored by the same command on several.
    """


for subcommand in (show, data, overlap, toxicity, cooccurrence):
    command.add_command(subcommand)


@command.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--suite", default="quick", show_default=True, help="A suite or task: name or file.")
@click.option(
    "--shots",
    metavar="N,N,...",
    help="Numbers of demonstrations; `few` is the task's own.  [default: suite's]",
)
@click.option(
    "--preset", default="glam", show_default=True, help="Whose conventions: glam, gpt3, ..."
)
@click.option("--limit", type=click.IntRange(1), help="Only the first items of each task.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Draws the demonstrations.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder of the files that tasks name."
)
@click.option(
    "--explain",
    metavar="[TASK:]N",
    help="Only item N (from 0), with its exact text and the scored tokens.",
)
@click.option(
    "--harness",
    metavar="TASK,...",
    help="Tasks of lm-eval instead of a suite; --shots is one number then.",
)
@click.option(
    "--include-path", type=click.Path(path_type=Path), help="Folder of lm-eval task files."
)
@click.option("--fresh", is_flag=True, help="Forget what an interrupted evaluation has scored.")
@hosts_options
@json_option
def score(
    run: Path,
    suite: str,
    shots: str | None,
    preset: str,
    limit: int | None,
    seed: int,
    data_dir: Path | None,
    explain: str | None,
    harness: str | None,
    include_path: Path | None,
    fresh: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    as_json: bool,
) -> int:
    """Score RUN on a suite of tasks: the long form of `glam eval RUN`."""
    counts, item = _shots(shots), _item(explain)
    chosen = load_suite(suite, preset)
    if harness is None and include_path is not None:
        raise RecipeError("--include-path: for the tasks of --harness")
    runtime = prepare_process(run)
    place = (coordinator, num_processes, process_id)
    asked = {
        "suite": harness or (chosen.name, chosen.sha256, preset),
        "shots": counts,
        "limit": limit,
        "seed": seed,
        "data_dir": data_dir,
    }
    with one_of_several(*place, runtime, as_json) as (host, progress):
        if harness is not None:
            _import_lm_eval()  # before the model is read: it may be missing
        _refuse_other_options(host, {"explain": explain, "harness": harness, "fresh": fresh}, asked)
        from glamcli.evals.results.journal import Journal
        from glamcli.evals.run import evaluate
        from glamcli.trained import open_trained

        trained = open_trained(run, progress, host)
        progress = progress if host.is_first else Silent()
        run_dir = trained.run_dir if host.is_first else None
        journal = Journal()
        if trained.run_dir is not None and item is None:
            conditions = {**trained.described(), **asked}
            journal = _journal(trained.run_dir, conditions, fresh, host, progress)
        with _resumable(journal, progress):
            if harness is not None:
                lm_eval_road = _import_lm_eval()
                tasks = harness.split(",")
                options = (include_path, counts, limit, seed)
                return lm_eval_road.score(
                    trained, journal, tasks, *options, run_dir, progress, as_json
                )
            drawn = {"shots": counts, "limit": limit, "seed": seed}
            where = {"data_dir": data_dir, "explain": item}
            results = evaluate(
                trained, chosen, progress=progress, journal=journal, **drawn, **where
            )
        if item is not None:
            return tell_items(results, progress, as_json)
        code = tell(results, run_dir, progress, as_json)
        journal.finish()  # what failed would fail again; with other data it starts anew
        return code


def _import_lm_eval() -> ModuleType:
    """The door to lm-eval.

    Raises:
        RecipeError: it is not installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars; ours is one line
    from glamcli.cli import harness

    return harness


@contextlib.contextmanager
def _resumable(journal: Journal, progress: Progress) -> Iterator[None]:
    """Says, when it is interrupted, that what was scored is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if journal.path is not None:
            progress.say("what was scored is kept: the same command goes on from there")
        raise


def _refuse_other_options(host: Host, *asked: Mapping[str, Any]) -> None:
    """Refuses processes that were given other options; the data is compared by content."""
    from glamcli.train import identity

    options = {f"--{name}": value for some in asked for name, value in some.items()}
    del options["--data_dir"]
    identity.refuse_differences(host, identity.of_command(host, options))


def _journal(
    run_dir: Path,
    conditions: Mapping[str, Any],
    fresh: bool,
    host: Host,
    progress: Progress,
) -> Journal:
    """What an earlier start of the same command has left, and where this one keeps its own.

    The first process reads and writes it; the others are told, so that all skip the same batches.
    """
    from glamcli.evals.results.journal import Journal

    journal = Journal()
    if host.is_first:
        try:
            journal = Journal.open(run_dir / "eval", conditions, fresh=fresh, warn=progress.warn)
        except OSError as error:
            progress.warn(f"not kept for a later start: {error.strerror}: {run_dir / 'eval'}")
    journal.known = host.gather("journal", journal.known)[0]
    if journal.known:
        progress.say(
            f"going on from {len(journal.known)} batches of an unfinished evaluation"
            " (`--fresh` starts over)"
        )
    return journal


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
