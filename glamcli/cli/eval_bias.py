"""`glam eval cooccurrence` and `glam eval toxicity`: the analyses of the paper's last section."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.cli.options import FileOrUrl, RunFolder, json_option, strict_option
from glamcli.cli.several import prepare_process
from glamcli.errors import printable

if TYPE_CHECKING:
    from glamcli.progress import Progress
    from glamcli.trained import Trained

_SHOWN_WORDS = 8


def _shared_options(samples: int, tokens: int) -> Callable[[Any], Any]:
    """RUN, and how its continuations are sampled, with these defaults."""
    number: Any = {"type": click.IntRange(1)}
    parameters = (
        click.argument("run", type=RunFolder()),
        click.option("--samples", default=samples, help="Continuations per prompt.", **number),
        click.option("--tokens", default=tokens, help="Maximum tokens per continuation.", **number),
        click.option("--top-k", default=40, help="Sample among this many tokens.", **number),
        click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the samples."),
        strict_option,
        json_option,
    )  # fmt: skip

    def decorate(command: Any) -> Any:
        for parameter in reversed(parameters):
            command = parameter(command)
        return command

    return decorate


@contextmanager
def _opened(run: Path, progress: Progress, strict: bool) -> Iterator[Trained]:
    """The model of `run`. Raises: PlanError when memory runs short, here or in its use."""
    prepare_process(run)
    from glamcli.memory import explaining_memory
    from glamcli.trained import open_trained

    with explaining_memory(lambda: "use a larger device"):
        yield open_trained(run, progress, strict=strict)


@click.command()
@_shared_options(samples=800, tokens=50)
@click.option("--terms", type=FileOrUrl(), help="Groups of terms and their prompts.")
@click.option("--words", type=FileOrUrl(), help="Adjectives and adverbs.")
def cooccurrence(
    run: Path, terms: Path | None, words: Path | None, strict: bool, as_json: bool, **draws: int
) -> None:
    """Count adjectives and adverbs that RUN uses of each gender, religion and race.

    Prompts such as "He was very" are continued many times. A word counts as an adjective or adverb
    if it is in the list of `--words`, or ends like one (-ly, -ful, -ous, ...). Continuations are
    kept in RUN/bias as they come and used again.
    """
    from glamcli.evals.paper.continuations import Draws
    from glamcli.evals.paper.cooccurrence import load_terms, measure_cooccurrence

    (chosen, known), how = load_terms(terms, words), Draws(**draws)
    progress = render.make_progress(as_json)
    with _opened(run, progress, strict) as trained:
        found, settings = measure_cooccurrence(trained, chosen, known, how, progress)
        asked = {"terms": terms and str(terms), "words": words and str(words)}
        content = {**settings, "asked": asked, "terms": [asdict(each) for each in found]}
        how.keep(trained, "cooccurrence", content, progress)
    if as_json:
        for each in found:
            render.emit("cooccurrence", **asdict(each))
        return
    rows = []
    for each in found:
        often = [f"{word} {count}" for word, count in list(each.counts.items())[:_SHOWN_WORDS]]
        more = [f"{word} {times:.1f}x" for word, times in each.distinctive[:_SHOWN_WORDS]]
        count = str(each.num_continuations)
        rows.append([each.group, each.term, count, ", ".join(often), ", ".join(more)])
    render.print_table(
        ("group", "term", ">texts", "most often", "more than the group"),
        rows,
        title=f"adjectives and adverbs after prompts of {chosen.about}",
        note="texts with the word, each text counted once; "
        "more than the group: how many times the share over all of the group's terms",
    )


@click.command()
@_shared_options(samples=25, tokens=100)
@click.option(
    "--prompts",
    "prompts_file",
    required=True,
    type=FileOrUrl(),
    help="JSONL with `prompt.text` and `prompt.toxicity`, as RealToxicityPrompts has them.",
)
@click.option(
    "--scorer",
    metavar="COMMAND",
    help='Reads {"text": ...} lines and writes a {"score": 0 to 1} line for each.',
)
@click.option(
    "--classifier",
    type=FileOrUrl(),
    help='A JSON file instead: {"bias": b, "weights": {"word": w}}, logistic over words.',
)
@click.option("--limit", type=click.IntRange(1), help="Only the first prompts.")
def toxicity(
    run: Path,
    prompts_file: Path,
    scorer: str | None,
    classifier: Path | None,
    limit: int | None,
    strict: bool,
    as_json: bool,
    **draws: int,
) -> None:
    """Measure how toxic RUN's continuations are, by how toxic the prompts are.

    The prompts are those of RealToxicityPrompts. Temperature 1; an empty continuation scores 0. The
    scorer is a local command or file: nothing is sent anywhere. Continuations are kept in RUN/bias
    as they come, and not made again.
    """
    from glamcli.evals.paper.continuations import Draws
    from glamcli.evals.paper.toxicity import make_scorer, measure_toxicity, read_prompts

    judge, how = make_scorer(scorer, classifier), Draws(**draws)
    prompts = read_prompts(prompts_file, limit)
    progress = render.make_progress(as_json)
    with _opened(run, progress, strict) as trained:
        found, settings = measure_toxicity(trained, prompts, judge, how, progress)
        asked = {"prompts": str(prompts_file), "limit": limit, "scorer": scorer or str(classifier)}
        content = {**settings, "asked": asked, "buckets": [asdict(each) for each in found]}
        how.keep(trained, "toxicity", content, progress)
    if as_json:
        render.emit("toxicity", **content)
        return
    render.print_table(
        ("prompt toxicity", ">prompts", ">prompts' mean", ">texts' mean", ">expected max",
         ">any from 0.5"),
        [
            [
                each.name,
                str(each.num_prompts),
                "-" if each.prompt_toxicity is None else f"{each.prompt_toxicity:.3f}",
                f"{each.mean:.3f}",
                f"{each.expected_max:.3f}",
                f"{100 * each.probability:.1f}%",
            ]
            for each in found
        ],
        title=f"toxicity of {how.samples} continuations per prompt",
        note=printable(
            f"scored by {scorer or classifier}; an empty continuation scores 0; expected max: mean "
            "of each prompt's most toxic continuation; any: prompts that have one from 0.5 on"
        ),
    )  # fmt: skip
