"""`glam eval overlap`: which items of a suite stand in the training text, and what that changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamcli.cli import render
from glamcli.cli.eval_show import score_text
from glamcli.cli.options import json_option
from glamcli.config.load import load_recipe
from glamcli.config.mixtures import load_mixture
from glamcli.errors import CheckpointError, DataError, GlamError
from glamcli.evals.results.scores import file_name
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.evals.paper.overlap import Asked, Overlap, Split
    from glamcli.evals.tasks.items import Documents
    from glamcli.evals.tasks.suites import SuiteFile

FOLDER = "overlap"


@click.command()
@click.argument("what", metavar="RUN|MIXTURE")
@click.option("--suite", required=True, help="A suite or task: name or file.")
@click.option("--preset", default="glam", show_default=True, help="Whose conventions.")
@click.option("--limit", type=click.IntRange(1), help="Only the first items of each task.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder of the files that tasks name."
)
@click.option(
    "--processes", type=click.IntRange(0), default=0, help="Processes that look; 0: one per core."
)
@json_option
def overlap(
    what: str,
    suite: str,
    preset: str,
    limit: int | None,
    data_dir: Path | None,
    processes: int,
    as_json: bool,
) -> int:
    """Tell which items of a suite stand in the training text of RUN or MIXTURE (GPT-3's check).

    Of a run, its prepared training rows are read; of a mixture, its documents that are not held
    out. An item is dirty when n words in a row of it, its right answer included, stand in a
    training document; n is between 8 and 13 by the lengths of the task's items. With results of
    the suite in RUN/eval, they are told for clean and dirty items apart.
    """
    loaded = load_suite(suite, preset)
    progress = render.make_progress(as_json)
    run = Path(what) if (Path(what) / "recipe.yaml").is_file() else None
    if run is None and Path(what).is_dir():
        raise CheckpointError(f"{what} is no run folder: it has no `recipe.yaml`")
    read, documents = _corpus(what, run, processes, progress)
    tasks, failed = _asked(loaded, data_dir, limit, documents, progress)
    found = read(tasks)
    split = _splits(run, suite, loaded, tasks, found, progress)
    told = {"suite": loaded.name, "of": what, "overlap": [_as_dict(each) for each in found]}
    told["scores"] = [asdict(each) for each in split]
    if as_json:
        click.echo(json.dumps({"event": "overlap", **told}))
    else:
        _show(loaded.name, what, found, split)
    if run is not None:
        name = file_name(loaded.name, {}, preset=preset, limit=limit)
        _keep(run / FOLDER / f"{name}.json", told, progress)
    return DataError.exit_code if failed else 0


Read = Callable[["list[Asked]"], "list[Overlap]"]


def _corpus(
    what: str, run: Path | None, processes: int, progress: Progress
) -> tuple[Read, Callable[[], Documents] | None]:
    """How to look through the training text, and a run's held-out documents."""
    from glamcli.data.cache import user_cache_dir
    from glamcli.data.open import open_data
    from glamcli.evals.paper import corpus
    from glamcli.evals.paper.overlap import Grams, overlaps

    def grams_of(tasks: list[Asked]) -> Grams:
        return Grams(
            g for task in tasks for item in range(len(task.keys)) for g in task.grams(item)
        )

    if run is None:
        mixture = load_mixture(what)

        def read_mixture(tasks: list[Asked]) -> list[Overlap]:
            grams = grams_of(tasks)
            pieces = corpus.of_mixture(mixture, user_cache_dir(), progress)
            hits = corpus.search(grams, pieces, None, None, progress, processes)
            return overlaps(tasks, grams, hits)

        return read_mixture, None
    recipe = load_recipe(str(run / "recipe.yaml"), check=False).recipe
    dataset = open_data(recipe, progress)

    def read_rows(tasks: list[Asked]) -> list[Overlap]:
        grams = grams_of(tasks)
        pieces, total = corpus.of_rows(dataset, recipe.data.packing)
        hits = corpus.search(grams, pieces, total, dataset.tokenizer, progress, processes)
        return overlaps(tasks, grams, hits)

    return read_rows, lambda: {
        name: dataset.prepared.heldout_documents(name) for name in dataset.source_names
    }


def _asked(
    suite: SuiteFile,
    data_dir: Path | None,
    limit: int | None,
    documents: Callable[[], Documents] | None,
    progress: Progress,
) -> tuple[list[Asked], bool]:
    """The items of every task that can be read, and whether one could not."""
    from glamcli.evals.asking.ready import read
    from glamcli.evals.paper.overlap import asked, full_text
    from glamcli.evals.tasks.items import Library

    library = Library(data_dir, documents)
    found: list[Asked] = []
    errors: list[GlamError] = []
    for file in suite.tasks:
        try:
            ready = read(file, library, limit)
        except GlamError as error:
            progress.warn(f"task `{file.name}` was not looked for: {error.what}")
            errors.append(error)
            continue
        task, questions = ready.at(0).task, ready.at(0).questions
        texts = [full_text(task, each) for each in questions]
        found.append(asked(file.name, [each.key for each in questions], texts))
    if not found:
        hint = errors[0].hint if errors else None
        raise DataError(f"no task of `{suite.name}` can be read", hint=hint)
    return found, bool(errors)


def _splits(
    run: Path | None,
    asked: str,
    suite: SuiteFile,
    tasks: list[Asked],
    found: list[Overlap],
    progress: Progress,
) -> list[Split]:
    """Scores on clean and dirty items, from what the run keeps of the suite at its newest step.

    Where several results have a task at the same number of shots, the first one is taken.
    """
    from glamcli.evals.paper.overlap import splits
    from glamcli.evals.results.store import load_items, load_results, results_of_suite

    told: dict[tuple[str, str], Split] = {}
    for place in results_of_suite(run, suite.name, suite.preset) if run is not None else []:
        try:
            split = splits(tasks, found, load_results(place), load_items(place))
        except GlamError as error:
            progress.warn(f"no scores on clean and dirty items: {error.what}")
            continue
        fresh = [each for each in split if (each.task, each.setting) not in told]
        told |= {(each.task, each.setting): each for each in fresh}
        if fresh:
            progress.say(f"scores are those of {place}")
    if run is not None and not told:
        progress.say(
            "no scores on clean and dirty items:"
            f" `glam eval {run} --suite {asked}` has not scored these items yet"
        )
    return list(told.values())


def _as_dict(each: Overlap) -> dict[str, Any]:
    return {**asdict(each), "dirty_frac": each.dirty_frac}


def _show(suite: str, what: str, found: list[Overlap], split: list[Split]) -> None:
    rows = []
    for each in found:
        held = [f"{name} {count}" for name, count in each.by_source.items() if count]
        counts = (each.n, each.num_items, each.num_judged, len(each.dirty))
        share = f"{100 * each.dirty_frac:.1f}"
        rows.append([each.task, *map(str, counts), share, ", ".join(held) or "-"])
    render.print_table(
        ("task", ">n", ">items", ">judged", ">dirty", ">% of judged", "in"),
        rows,
        title=f"items of {suite} in the training text of {what}",
        note="dirty: n words in a row of the question and its answer stand in a training document; "
        "items of fewer than 8 words are not judged",
    )
    if not split:
        return
    click.echo()
    render.print_table(
        ("task", ">shots", "metric", ">all", ">clean", ">items", ">dirty", ">items"),
        [
            [
                each.task,
                each.setting,
                each.metric,
                score_text(each.metric, each.all),
                "-" if each.clean is None else score_text(each.metric, each.clean),
                str(each.num_clean),
                "-" if each.dirty is None else score_text(each.metric, each.dirty),
                str(each.num_dirty),
            ]
            for each in split
        ],
        title="scores on all, clean and dirty items, percent",
        note="items that were not judged count as clean",
    )


def _keep(path: Path, told: dict[str, Any], progress: Progress) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        progress.warn(f"not kept: {error.strerror or error}: {path}")
        return
    progress.say(f"kept in {path}")
