"""`glam generate`: a trained run continues texts, one by one or as a conversation with a pipe."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli.options import hosts_options, json_option
from glamcli.cli.several import one_of_several, prepare_process
from glamcli.errors import RecipeError, printable
from glamcli.progress import Progress, Silent

if TYPE_CHECKING:
    from glamcli.generate import Generator, Sampling
    from glamcli.hosts.join import Host

MAX_TOKENS = 65_536


class FiniteRange(click.FloatRange):
    """A range of numbers that NaN, which compares with nothing, and infinity are outside of."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--tokens", type=click.IntRange(1, MAX_TOKENS), default=128, show_default=True)
@click.option(
    "--temperature",
    type=FiniteRange(0),
    default=0.8,
    show_default=True,
    help="0 is the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(1), help="Draw among the K likeliest tokens.")
@click.option(
    "--top-p",
    type=FiniteRange(0, 1, min_open=True),
    help="Draw among the likeliest that have probability P.",
)
@click.option("--beam", type=click.IntRange(1), help="Beam search of this width, no drawing.")
@click.option(
    "--alpha",
    type=FiniteRange(0),
    default=0.6,
    show_default=True,
    help="Length penalty of --beam: 0.6 as T5, 0.8 favours longer texts, 0 none.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="The same seed, the same text.")
@click.option("--samples", type=click.IntRange(1, 256), default=1, show_default=True)
@hosts_options
@json_option
def command(
    run: Path,
    prompt: str | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    beam: int | None,
    alpha: float,
    seed: int,
    samples: int,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    as_json: bool,
) -> None:
    """Continue PROMPT with RUN, a run folder or a checkpoint.

    Without PROMPT, every line typed (or piped in) is one. On several hosts, start the same command
    on each of them: the first process reads the lines and shows the texts.
    """
    if beam is not None and samples > beam:
        raise RecipeError(f"a beam of {beam} has no {samples} samples", hint="raise `--beam`")
    runtime = prepare_process(run)
    with one_of_several(coordinator, num_processes, process_id, runtime, as_json) as (
        host,
        progress,
    ):
        from glamcli.generate import Sampling
        from glamcli.train import identity
        from glamcli.trained import open_trained

        options = {"PROMPT": prompt, "--tokens": tokens, "--temperature": temperature}
        options |= {"--top-k": top_k, "--top-p": top_p, "--beam": beam, "--alpha": alpha}
        options |= {"--seed": seed, "--samples": samples, "--json": as_json}
        identity.refuse_differences(host, identity.of_command(host, options))
        trained = open_trained(run, progress, host)
        progress = progress if host.is_first else Silent()

        sampling = Sampling(temperature, top_k, top_p)
        asked = Asked(trained.generator, sampling, tokens, beam, alpha, seed, samples)
        for each in _prompts_of_all(prompt, host):
            _answer(asked, each, trained.window, progress, as_json)


def _answer(asked: Asked, prompt: str, row_tokens: int, progress: Progress, as_json: bool) -> None:
    """Makes and shows the continuations of one prompt."""
    length = len(asked.generator.encode(prompt)) + asked.tokens
    if length > row_tokens:
        progress.warn(
            f"{length} tokens are more than the {row_tokens} of the rows it was trained on"
        )
    if as_json:
        for number, text in enumerate(asked.texts(prompt)):
            click.echo(json.dumps({"prompt": prompt, "sample": number, "text": text}))
    else:
        _show(asked, prompt)


@dataclass(frozen=True)
class Asked:
    """What the options ask of every prompt."""

    generator: Generator
    sampling: Sampling
    tokens: int
    beam: int | None
    alpha: float
    seed: int
    samples: int

    def texts(self, prompt: str) -> list[str]:
        """The continuations, whole; by beam search best first."""
        if self.beam is None:
            return self.generator.texts(
                prompt, self.sampling, tokens=self.tokens, samples=self.samples, seed=self.seed
            )
        (found,) = self.generator.beams(
            [self.generator.encode(prompt)], width=self.beam, tokens=self.tokens, alpha=self.alpha
        )
        return [each.text for each in found[: self.samples]]

    def stream(self, prompt: str) -> Iterator[str]:
        """The only continuation, piece by piece."""
        pieces = self.generator.stream(prompt, self.sampling, tokens=self.tokens, seed=self.seed)
        return (text for _, text in pieces)


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
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # pyright: ignore
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    click.echo("type a text to continue; Ctrl-D ends", err=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo(err=True)
            return
        if line.strip():
            yield line


def _show(asked: Asked, prompt: str) -> None:
    """Prompt and continuation; a single one appears while it is made."""
    if asked.samples == 1 and asked.beam is None:
        _write(prompt)
        for text in asked.stream(prompt):
            _write(text)
        _write("\n")
        return
    for number, text in enumerate(asked.texts(prompt), 1):
        if asked.samples > 1:
            _write(f"--- {number}\n")
        _write(f"{prompt}{text}\n")


def _write(text: str) -> None:
    """Text to standard output at once; a terminal is shown nothing that it would act on."""
    click.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
    sys.stdout.flush()
