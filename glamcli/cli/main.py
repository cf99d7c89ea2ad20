"""The `glam` command: its table of subcommands, and what every way of ending prints and returns.

A subcommand is imported when it is run, so `glam --help` and the recipe commands start without
jax. Each is in `glamcli/cli/<name>.py` as `command`.
"""

import importlib
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import warnings
from typing import TextIO, cast

import click

import glamcli
from glamcli import libtpu
from glamcli.cli import streams
from glamcli.config.nearest import did_you_mean
from glamcli.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    GlamError,
    printable,
    redacted,
)

STARTED = time.monotonic()

COMMANDS = {
    "train": "Train a recipe, or resume it; the same command does both.",
    "watch": "Show how a run is doing, until Ctrl-C.",
    "launch": "Train a recipe on a TPU slice that is rented for it.",
    "plan": "Say what a recipe needs and costs on devices you do not have.",
    "eval": "Score a trained run on a suite of tasks.",
    "generate": "Continue a text with a trained run.",
    "report": "Show runs on one HTML page: losses, routers, scores, speed.",
    "checkpoint": "List, verify, rewind and compare saved steps.",
    "recipe": "List, show, check, compare and start recipes.",
    "data": "Prepare the sources of a mixture and look into them.",
    "tokenizer": "Train a tokenizer on a mixture, or look into one.",
    "doctor": "Describe this machine, and check that meshes agree.",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand's module when it is run, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"glamcli.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    commands={name: click.Command(name) for name in COMMANDS},  # for click's suggestions
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
    epilog="\b\nA recipe is a shipped name (`glam recipe list`) or a file.\n"
    "Start with `glam train quickstart`.",
)
@click.version_option(glamcli.__version__, prog_name="glam", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def root(debug: bool) -> None:
    """Train and evaluate GLaM-style mixture-of-experts language models."""
    del debug  # `_run` looks for it, also after errors in the command line


def run(args: list[str] | None = None) -> None:
    """The entry point: runs a command and exits with its code; never shows a bare traceback."""
    streams.open_missing()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore
    # Of a library, such as jax's of a cache that it cannot use: as our own, without its code.
    warnings.formatwarning = lambda message, *_, **__: printable(f"warning: {message}") + "\n"
    if not libtpu.has_tpu():
        libtpu.quiet()
    stdout, sys.stdout = sys.stdout, cast(TextIO, streams.Output(sys.stdout))
    try:
        code = _run(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
    except OSError as error:  # of standard output; `_run` takes any other
        code = _end_without_output(error)
    finally:
        sys.stdout = stdout
    if code and args is None:  # the process is this command's own
        _leave_threads_behind(code)
    sys.exit(code)


def _leave_threads_behind(code: int) -> None:
    """Ends the process at once if threads would keep or outlive it: after a failed save, orbax's
    wait five minutes for a folder that will never appear; after an interrupt, XLA's may still be
    computing, and Python's shutdown beneath them is a segmentation fault."""
    waiting = (t for t in threading.enumerate() if t is not threading.main_thread())
    if code == EXIT_INTERRUPTED or any(not thread.daemon for thread in waiting):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(args: list[str]) -> int:
    """Runs the command; the exit code."""
    debug = args[:1] == ["--debug"]
    try:
        result = root.main(args, prog_name="glam", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except GlamError as error:
        if debug:
            click.echo(redacted(traceback.format_exc()), err=True)
        if not error.is_shown:
            complain(error.what, error.hint)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        return 0
    except click.ClickException as error:
        complain(*_usage(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted", None)
        return EXIT_INTERRUPTED
    except (BrokenPipeError, streams.OutputError):
        raise
    except SystemExit:  # what click and rich make of a broken pipe; no command exits by itself
        raise BrokenPipeError from None
    except Exception as error:
        _report_bug(error, debug)
        return 1


def _usage(error: click.ClickException) -> tuple[str, str | None]:
    """What and hint of a usage error, in the words of this project."""
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    path = ctx.command_path if ctx else "glam"
    near = list(getattr(error, "possibilities", None) or [])
    listed = f"`{path} --help` lists them"
    if isinstance(error, click.NoSuchOption):
        hint = did_you_mean(error.option_name, near, listed, cutoff=0.0)
        return f"no such option: `{error.option_name}`", hint
    if name := getattr(error, "command_name", None):  # NoSuchCommand, since click 8.4
        hint = f"did you mean `{path} {near[0]}`?" if near else listed
        return f"no such command: `{name}`", hint
    message = re.sub(r"'([^']*)'", r"`\1`", error.format_message().rstrip("."))
    return message[:1].lower() + message[1:], f"see `{path} --help`" if ctx else None


def complain(what: str, hint: str | None) -> None:
    """Prints the two lines of an error on stderr, in colour only on a terminal and where the user
    wants it (no-color.org)."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    colour = False if plain else None  # None: what the stream is decides
    text = click.style("error: ", fg="red", bold=True) + printable(redacted(what))
    if hint:
        text += "\n" + click.style("hint: ", fg="cyan") + printable(hint)
    try:
        click.echo(text, err=True, color=colour)
    except OSError:  # the terminal was closed
        streams.to_nowhere(sys.stderr)


def _report_bug(error: Exception, debug: bool) -> None:
    """Prints one line about an unforeseen error; its traceback is shown or written to a file."""
    text = redacted("".join(traceback.format_exception(error)))
    summary = redacted(f"{type(error).__name__}: {error}".split("\n")[0])[:200]
    if debug:
        click.echo(text, err=True)
        complain(f"this is a bug in glam: {summary}", None)
        return
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="glam-error-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        where = f"the traceback is in {file.name}"
    except OSError:
        where = "`glam --debug ...` shows the traceback"
    complain(f"this is a bug in glam: {summary}", where)


def _end_without_output(error: OSError) -> int:
    """The exit code after a result could not be shown. Silent, also when Python shuts down, when
    its reader is gone (as in `| head`)."""
    streams.to_nowhere(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    hint = "; ".join(getattr(error, "__notes__", ())) or None
    complain(f"standard output cannot be written: {error.strerror or error}", hint)
    return 1
