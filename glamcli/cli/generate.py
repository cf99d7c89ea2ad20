"""`glam generate`: a trained run continues texts, one by one or as a conversation with a pipe."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli.options import Address, hosts_options, json_option, run_argument, strict_option
from glamcli.cli.several import one_of_several, prepare_process
from glamcli.config.settings import MAX_NEW_TOKENS, MAX_TEXTS
from glamcli.errors import RecipeError, printable
from glamcli.progress import Silent

if TYPE_CHECKING:
    from pathlib import Path

    from glamcli.generate import Decoding, Generator
    from glamcli.hosts.join import Host


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN, which compares with nothing, and infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Raises: click.BadParameter outside of the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


@click.command()
@run_argument
@click.argument("prompt", required=False)
@click.option(
    "--tokens",
    type=click.IntRange(1, MAX_NEW_TOKENS),
    default=128,
    help="Maximum tokens per continuation.",
)
@click.option(
    "--temperature", type=FiniteRange(0), default=0.8, help="0 takes the most likely token."
)
@click.option("--top-k", type=click.IntRange(1), help="Sample among the K most likely tokens.")
@click.option(
    "--top-p",
    type=FiniteRange(0, 1, min_open=True),
    help="Sample among the most likely tokens whose probabilities add up to P.",
)
@click.option(
    "--beam", type=click.IntRange(1, MAX_TEXTS), help="Width of a beam search instead of sampling."
)
@click.option(
    "--alpha",
    type=FiniteRange(0),
    default=0.6,
    help="Length penalty of --beam: 0.6 as in T5, 0.8 favours longer texts, 0 turns it off.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, help="The same seed gives the same text."
)
@click.option(
    "--samples", type=click.IntRange(1, MAX_TEXTS), default=1, help="Continuations per prompt."
)
@strict_option
@hosts_options
@json_option
def command(
    run: Path, prompt: str | None, strict: bool, address: Address, as_json: bool, **options: Any
) -> None:
    """Continue PROMPT with RUN, a run folder or a checkpoint.

    Without PROMPT, every line typed (or piped in) is one. On several hosts, start the same command
    on each of them: the first process reads the lines and shows the texts.
    """
    if prompt is not None:
        prompt = _utf8(prompt, "PROMPT")
    runtime = prepare_process(run)
    with ExitStack() as stack:
        host, progress = stack.enter_context(one_of_several(address, run, runtime, as_json))
        from glamcli.generate import Decoding
        from glamcli.hosts.watchdog import LONG, make_watchdog
        from glamcli.train import identity
        from glamcli.trained import open_trained

        decoding = Decoding(**options)
        mine = {"PROMPT": prompt, "--json": as_json, "--strict": strict, **options}
        identity.refuse_differences(host, identity.of_command(host, mine))
        watchdog = stack.enter_context(make_watchdog(runtime, host))
        watchdog.beat("restoring", LONG)
        trained = open_trained(run, progress, host, strict=strict)
        progress = progress if host.is_first else Silent()
        trained.generator.before_token = partial(watchdog.beat, "generating", LONG)
        watchdog.rest()  # the next line may come any time
        for each in _prompts_of_all(prompt, host):
            watchdog.beat("generating", LONG)
            length = len(trained.generator.encode(each)) + decoding.tokens
            if length > trained.window:
                progress.warn(
                    f"{length} tokens are more than the {trained.window} of the rows it was "
                    "trained on"
                )
            _show(trained.generator, each, decoding, as_json)
            watchdog.rest()


def _prompts_of_all(prompt: str | None, host: Host) -> Iterator[str]:
    """The prompts of the first process, in all of them."""
    mine = _prompts(prompt) if host.is_first else iter(())
    while (each := host.gather("prompt", next(mine, None))[0]) is not None:
        yield each


def _prompts(prompt: str | None) -> Iterator[str]:
    """The prompt given, or the lines of standard input until it ends."""
    if prompt is not None:
        yield prompt
        return
    if hasattr(sys.stdin, "reconfigure"):  # whatever the locale says
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin, 1):
            yield _utf8(line.rstrip("\r\n"), f"line {number} of standard input")
        return
    click.echo("type a text to continue; Ctrl-D ends", err=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo(err=True)
            return
        if line.strip():
            yield _utf8(line, "this line")


def _utf8(text: str, what: str) -> str:
    """The text of an argument or a line, whose bytes are UTF-8 also where the locale is not."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise RecipeError(
            f"{what} is not UTF-8", hint="convert it, for example with `iconv`"
        ) from None


def _show(generator: Generator, prompt: str, decoding: Decoding, as_json: bool) -> None:
    """Prompt and continuations; a single sample appears while it is made."""
    if as_json:
        for number, text in enumerate(generator.continuations(prompt, decoding)):
            click.echo(json.dumps({"prompt": prompt, "sample": number, "text": text}))
        return
    if decoding.samples == 1 and decoding.beam is None:
        _write(prompt)
        options = {"tokens": decoding.tokens, "seed": decoding.seed}
        for _, text in generator.stream(prompt, decoding.sampling, **options):
            _write(text)
        _write("\n")
        return
    for number, text in enumerate(generator.continuations(prompt, decoding), 1):
        if decoding.samples > 1:
            _write(f"--- {number}\n")
        _write(f"{prompt}{text}\n")


def _write(text: str) -> None:
    """Text to standard output at once; on a terminal without characters that control it."""
    click.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
    sys.stdout.flush()
