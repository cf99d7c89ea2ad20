"""`glam eval overlap`: which items of a suite occur in the training text, and what that changes."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glamcli.cli import render
from glamcli.cli.eval_show import score_text
from glamcli.cli.options import FileOrUrl, json_option
from glamcli.config.files import run_folder
from glamcli.config.load import load_recipe
from glamcli.config.mixtures import load_mixture
from glamcli.errors import CheckpointError, DataError
from glamcli.evals.results.scores import file_name
from glamcli.evals.results.store import keep_analysis
from glamcli.evals.tasks.suites import load_suite
from glamcli.storage import is_url
from glamcli.stored_runs import OVERLAP_FOLDER, local

if TYPE_CHECKING:
    from glamcli.evals.paper.overlap import Overlap, Split


@click.command()
@click.argument("what", metavar="RUN|MIXTURE")
@click.option("--suite", required=True, help="A suite or task: name or file.")
@click.option("--preset", default="glam", help="Conventions: glam, gpt3, ...")
@click.option("--limit", type=click.IntRange(1), help="Only the first items of each task.")
@click.option("--data-dir", type=FileOrUrl(), help="Folder of the files that tasks name.")
@click.option(
    "--processes", type=click.IntRange(0), default=0, help="Search processes, 0 for one per core."
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
    """List the items of a suite that occur in the training text of RUN or MIXTURE (GPT-3's check).

    Of a run, its prepared training rows are read; of a mixture, its documents that are not held
    out. An item is dirty when n words in a row of it, its right answer included, occur in a
    training document; n is between 8 and 13 by the lengths of the task's items. With results of
    the suite in RUN/eval, scores are also shown for clean and for dirty items.
    """
    from glamcli.data.open import open_data
    from glamcli.evals.paper import corpus
    from glamcli.evals.paper.overlap import find_overlaps
    from glamcli.evals.tasks.items import Library

    chosen = load_suite(suite, preset)
    progress = render.make_progress(as_json)
    run, folder = _run(what), None
    if run is not None:
        folder = local(run, metrics=False, results=True)
        recipe = load_recipe(str(folder / "recipe.yaml"), check=False).recipe
        dataset = open_data(recipe, progress)
        documents = dataset.heldout_documents
        text, packing = dataset, recipe.data.packing
    elif os.path.isdir(what):
        raise CheckpointError(f"{what} is not a run folder: it has no `recipe.yaml`")
    else:
        documents, text, packing = None, load_mixture(what), ""
    search = partial(
        corpus.search_text, text=text, packing=packing, progress=progress, processes=processes
    )
    library = Library(data_dir, documents)
    found, splits, failed = find_overlaps(chosen, library, limit, search, folder, progress)
    if run is not None and not splits:
        progress.say(
            "no scores on clean and dirty items:"
            f" `glam eval {run} --suite {suite}` has not scored these items yet"
        )
    content = {
        "suite": chosen.name,
        "of": what,
        "overlap": [asdict(each) for each in found],
        "scores": [asdict(each) for each in splits],
    }
    if as_json:
        render.emit("overlap", **content)
    else:
        _show(chosen.name, what, found, splits)
    if run is not None:
        name = file_name(chosen.name, {}, preset=preset, limit=limit)
        keep_analysis(content, run / OVERLAP_FOLDER, name, progress)
    return DataError.exit_code if failed else 0


def _run(what: str) -> Path | None:
    """The run that is meant; None where a mixture is."""
    if is_url(what):
        return None if what.endswith((".yaml", ".yml", ".json")) else run_folder(what)
    return Path(what) if os.path.isfile(Path(what) / "recipe.yaml") else None


def _show(suite: str, what: str, found: list[Overlap], split: list[Split]) -> None:
    render.print_table(
        ("task", ">n", ">items", ">judged", ">dirty", ">% of judged", "in"),
        [
            [
                each.task,
                *map(str, (each.n, each.num_items, each.num_judged, len(each.dirty))),
                f"{100 * each.dirty_frac:.1f}",
                ", ".join(f"{name} {n}" for name, n in each.by_source.items() if n) or "-",
            ]
            for each in found
        ],
        title=f"items of {suite} in the training text of {what}",
        note="dirty: n words in a row of the question and its answer occur in a training document; "
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
                score_text(each.metric, each.clean),
                str(each.num_clean),
                score_text(each.metric, each.dirty),
                str(each.num_dirty),
            ]
            for each in split
        ],
        title="scores on all, clean and dirty items, percent",
        note="items that were not judged count as clean",
    )
