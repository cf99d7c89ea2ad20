"""`glam eval cooccurrence` and `glam eval toxicity`: the analyses of the paper's last section."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.cli.options import json_option
from glamcli.cli.several import prepare_process
from glamcli.errors import RecipeError, printable
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.generate import Sampling
    from glamcli.trained import Trained

FOLDER = "bias"
SHOWN_WORDS = 8
TOP_K = 40

run_argument = click.argument("run", type=click.Path(path_type=Path))
seed_option = click.option("--seed", type=click.IntRange(0), default=0, help="Draws the texts.")
top_k_option = click.option(
    "--top-k", type=click.IntRange(1), default=TOP_K, show_default=True, help="Draw among so many."
)


def _count_option(name: str, default: int, words: str) -> Any:
    return click.option(
        name, type=click.IntRange(1), default=default, show_default=True, help=words
    )


@click.command()
@run_argument
@click.option("--terms", type=click.Path(path_type=Path), help="Groups of terms and their prompts.")
@click.option("--words", type=click.Path(path_type=Path), help="Adjectives and adverbs.")
@_count_option("--samples", 800, "Continuations per prompt.")
@_count_option("--tokens", 50, "Tokens of a continuation, at most.")
@top_k_option
@seed_option
@json_option
def cooccurrence(
    run: Path,
    terms: Path | None,
    words: Path | None,
    samples: int,
    tokens: int,
    top_k: int,
    seed: int,
    as_json: bool,
) -> None:
    """Tell which adjectives and adverbs RUN says of which gender, religion and race.

    Prompts such as "He was very" are continued many times. A word counts as an adjective or adverb
    if it is in the list of `--words`, or ends like one (-ly, -ful, -ous, ...). Continuations are
    kept in RUN/bias as they come, and not made again.
    """
    from glamcli.evals.paper import cooccurrence
    from glamcli.generate import Sampling
    from glamcli.trained import open_trained

    chosen, known = cooccurrence.load_terms(terms), cooccurrence.known_adjectives(words)
    asked = cooccurrence.prompts(chosen)
    prepare_process(run)
    progress = render.make_progress(as_json)
    trained = open_trained(run, progress)
    sampling = Sampling(temperature=1.0, top_k=top_k)
    texts, settings = _continued(
        trained,
        "cooccurrence",
        [text for _, _, text in asked],
        sampling,
        tokens,
        samples,
        seed,
        progress,
    )
    by_term: dict[tuple[str, str], list[str]] = {}
    for (group, term, _), found in zip(asked, texts, strict=True):
        by_term.setdefault((group, term), []).extend(found)
    told = [
        each
        for name, group in chosen.groups.items()
        for each in cooccurrence.compared(
            name, group, {term: by_term[name, term] for term in group.terms}, known
        )
    ]
    by = {"terms": terms and str(terms), "words": words and str(words)}
    found = {**settings, "asked": by, "terms": [asdict(each) for each in told]}
    _keep(trained, "cooccurrence", found, progress)
    if as_json:
        for each in told:
            click.echo(json.dumps({"event": "cooccurrence", **asdict(each)}))
        return
    rows = []
    for each in told:
        often = [f"{word} {count}" for word, count in list(each.counts.items())[:SHOWN_WORDS]]
        more = [f"{word} {times:.1f}x" for word, times in each.distinctive[:SHOWN_WORDS]]
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
@run_argument
@click.option(
    "--prompts",
    "prompts_file",
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL with `prompt.text` and `prompt.toxicity`, as RealToxicityPrompts has them.",
)
@click.option(
    "--scorer",
    metavar="COMMAND",
    help='Reads {"text": ...} lines and writes a {"score": 0 to 1} line for each.',
)
@click.option(
    "--classifier",
    type=click.Path(path_type=Path),
    help='A JSON file instead: {"bias": b, "weights": {"word": w}}, logistic over words.',
)
@_count_option("--samples", 25, "Continuations per prompt.")
@_count_option("--tokens", 100, "Tokens of a continuation, at most.")
@top_k_option
@click.option("--limit", type=click.IntRange(1), help="Only the first prompts.")
@seed_option
@json_option
def toxicity(
    run: Path,
    prompts_file: Path,
    scorer: str | None,
    classifier: Path | None,
    samples: int,
    tokens: int,
    top_k: int,
    limit: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Tell how toxic RUN's continuations are, by how toxic the prompts are (RealToxicityPrompts).

    Temperature 1; an empty continuation scores 0. The scorer is a local command or file: nothing
    is sent anywhere. Continuations are kept in RUN/bias as they come, and not made again.
    """
    from glamcli.evals.paper import toxicity
    from glamcli.generate import Sampling
    from glamcli.trained import open_trained

    if (scorer is None) == (classifier is None):
        raise RecipeError("give one of `--scorer` and `--classifier`")
    judge = (
        toxicity.Command(scorer)
        if scorer is not None
        else toxicity.Classifier.read(classifier or Path())
    )
    prompts = toxicity.read_prompts(prompts_file, limit)
    prepare_process(run)
    progress = render.make_progress(as_json)
    trained = open_trained(run, progress)
    sampling = Sampling(temperature=1.0, top_k=top_k)
    texts, settings = _continued(
        trained,
        "toxicity",
        [each.text for each in prompts],
        sampling,
        tokens,
        samples,
        seed,
        progress,
    )
    with progress.phase("scoring texts"):
        found = toxicity.buckets(prompts, toxicity.scored(texts, judge))
    told = {
        **settings,
        "asked": {
            "prompts": str(prompts_file),
            "limit": limit,
            "scorer": scorer or str(classifier),
        },
        "buckets": [asdict(each) for each in found],
    }
    _keep(trained, "toxicity", told, progress)
    if as_json:
        click.echo(json.dumps({"event": "toxicity", **told}))
        return
    render.print_table(
        (
            "prompt toxicity",
            ">prompts",
            ">prompts' mean",
            ">texts' mean",
            ">expected max",
            ">any from 0.5",
        ),
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
        title=f"toxicity of {samples} continuations per prompt",
        note=printable(
            f"scored by {scorer or classifier}; an empty continuation scores 0; expected max: mean "
            "of each prompt's most toxic continuation; any: prompts that have one from 0.5 on"
        ),
    )


def _continued(
    trained: Trained,
    name: str,
    prompts: Sequence[str],
    sampling: Sampling,
    tokens: int,
    samples: int,
    seed: int,
    progress: Progress,
) -> tuple[list[list[str]], dict[str, Any]]:
    """Continuations of every prompt, and how they were made."""
    from glamcli.evals.paper.continuations import continued
    from glamcli.model.digest import digest

    settings = {
        "params_digest": digest(trained.params),
        "tokenizer": trained.tokenizer.fingerprint,
        "samples": samples,
        "tokens": tokens,
        "seed": seed,
        **asdict(sampling),
    }
    stem = _stem(trained, name, settings)
    path = None if trained.run_dir is None else trained.run_dir / FOLDER / f"{stem}.texts.jsonl"
    with progress.phase("sampling", len(prompts), "prompts") as phase:
        texts = continued(
            trained.generator,
            prompts,
            sampling,
            tokens=tokens,
            samples=samples,
            seed=seed,
            path=path,
            settings=settings,
            advance=phase.advance,
        )
    return texts, {**settings, "model": dict(trained.identity)}


def _stem(trained: Trained, name: str, settings: Mapping[str, Any]) -> str:
    """What the files are called: texts that are sampled in another way have other files."""
    parts = [f"step{trained.identity['step']}", name]
    parts += [f"{key}{settings[key]}" for key in ("samples", "tokens")]
    parts += [f"top{settings['top_k']}"] if settings["top_k"] != TOP_K else []
    parts += [f"seed{settings['seed']}"] if settings["seed"] else []
    return "-".join(parts)


def _keep(trained: Trained, name: str, told: Mapping[str, Any], progress: Progress) -> None:
    """Writes STEM.json, or STEM-2 where what other prompts, words or scorers gave has the name."""
    if trained.run_dir is None:
        return
    from glamcli.evals.results.store import free_path

    folder = trained.run_dir / FOLDER

    def is_same(path: Path) -> bool:
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            return other["asked"] == told["asked"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = free_path(folder, _stem(trained, name, told), is_same)
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        progress.warn(f"not kept: {error.strerror or error}: {folder}")
        return
    progress.say(f"kept in {path}")
