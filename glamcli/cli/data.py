"""`glam data`: prepare the sources of a recipe, look into them, check them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from glamcli.cli import render
from glamcli.cli.options import json_option, set_option
from glamcli.config.files import shipped
from glamcli.config.load import Loaded, load_recipe
from glamcli.errors import DataError, RecipeError, printable
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.data.mixture import Schedule
    from glamcli.data.open import Dataset
    from glamcli.data.rows import Row
    from glamcli.data.tokenizer import Tokenizer

NUMBER = click.IntRange(min=0)
recipe_argument = click.argument("recipe")


@click.group()
def command() -> None:
    """Prepare the sources of a mixture and look into them."""


@command.command("prepare")
@recipe_argument
@set_option
@json_option
def prepare_data(recipe: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Tokenise and pack the sources of RECIPE, so that training starts at once.

    Training does this when needed; what is already prepared is kept. Another mixture for the same
    recipe: `--set data.mixture=NAME`.
    """
    loaded, data = _open(recipe, sets, render.make_progress(as_json))
    _show_table(data, loaded, as_json)


@command.command("show")
@recipe_argument
@set_option
@click.option("--rows", "num_rows", type=NUMBER, default=3, help="Rows to show.")
@click.option("--step", type=NUMBER, default=0, help="Step they are from.")
@click.option("--source", help="Only rows of this source.")
@json_option
def show_data(
    recipe: str,
    sets: tuple[str, ...],
    num_rows: int,
    step: int,
    source: str | None,
    as_json: bool,
) -> None:
    """Show what RECIPE trains on: the table of its sources, and rows as the model gets them.

    `<s>` and `</s>` mark where a document begins and ends, `…` where it continues in another row.
    """
    loaded, data = _open(recipe, sets, render.make_progress(as_json))
    if source is not None and source not in data.source_names:
        names = ", ".join(f"`{name}`" for name in data.source_names)
        raise RecipeError(f"no source is called `{source}`", hint=f"the mixture has {names}")
    _show_table(data, loaded, as_json)
    first = step * data.batch_rows
    stop = max(first, loaded.recipe.train.steps * data.batch_rows) + data.batch_rows
    for k in _rows_of(data.schedule, source, first, stop, num_rows):
        _show_row(data, k, as_json)


@command.command("verify")
@recipe_argument
@set_option
@click.option("--duplicates", is_flag=True, help="Also read the sources and count equal documents.")
@json_option
def verify_data(recipe: str, sets: tuple[str, ...], duplicates: bool, as_json: bool) -> None:
    """Read everything that is prepared for RECIPE and compare it with its checksums.

    Exits with 3 when something is damaged, naming every damaged file.
    """
    progress = render.make_progress(as_json)
    _, data = _open(recipe, sets, progress)
    damaged: list[DataError] = []
    with progress.phase("verifying prepared rows", len(data.source_names), "sources") as phase:
        for name in data.source_names:
            damaged += data.prepared.damage(name, data.tokenizer.vocab_size)
            phase.advance()
    if duplicates:
        _show_duplicates(data, progress, as_json)
    if damaged:
        raise DataError("\n".join(error.what for error in damaged), hint=damaged[0].hint)
    splits = [*data.prepared.train.values(), *data.prepared.heldout.values()]
    num_rows = sum(map(len, splits))
    if as_json:
        render.emit("verified", rows=num_rows)
    else:
        click.echo(f"all {num_rows:,} rows of {len(data.source_names)} sources are as prepared")


def _open(name: str, sets: tuple[str, ...], progress: Progress) -> tuple[Loaded, Dataset]:
    """A recipe and its data; a mixture's name has its own error, because rows need a recipe."""
    from glamcli.data.open import open_data

    if name in shipped("data_mixtures") and name not in shipped("recipes"):
        raise RecipeError(
            f"`{name}` is a mixture; rows depend on a recipe's tokenizer and row length too",
            hint=f"name a recipe and add `--set data.mixture={name}`",
        )
    loaded = load_recipe(name, sets)
    return loaded, open_data(loaded.recipe, progress)


def _show_table(data: Dataset, loaded: Loaded, as_json: bool) -> None:
    steps = loaded.recipe.train.steps
    summary = data.summary(steps)
    if as_json:
        for line in summary:
            render.emit("source", **line)
        return
    columns = {
        "source": "{name}",
        ">weight": "{weight_asked:.4g}",
        ">realised": "{weight_realised:.4g}",
        ">documents": "{num_documents:,}",
        ">rows": "{num_rows:,}",
        ">tokens": "{num_tokens:,}",
        ">full": "{utilisation:.1%}",
        ">held out": "{heldout_documents:,} / {heldout_rows:,}",
        ">run tokens": "{run_tokens:,.0f}",
        ">epochs": "{epochs:.3g}",
    }
    note = (
        f"run: {steps:,} steps of {data.batch_rows} rows of {loaded.recipe.batch.row_tokens} "
        "tokens; held out: documents / rows"
    )
    if any(line["num_changed"] for line in summary):
        columns[">changed"] = "{num_changed:,} / {num_unknown:,}"
        note += "; changed by the tokenizer: documents / unknown tokens"
    render.print_table(
        list(columns),
        [[cell.format(**line) for cell in columns.values()] for line in summary],
        title=f"mixture `{loaded.recipe.data.mixture}` for `{loaded.name}`",
        note=note,
    )


def _rows_of(
    schedule: Schedule, source: str | None, first: int, stop: int, count: int
) -> Iterator[int]:
    """The next `count` rows of the run from `first` on, of one source or of any."""
    if source is None:
        yield from range(first, first + count)
        return
    for _ in range(count):
        ends = range(first + 1, stop + 1)
        at = bisect_left(ends, 1, key=lambda end, first=first: schedule.counts(first, end)[source])
        if at == len(ends):
            return
        yield first + at
        first += at + 1


def _show_row(data: Dataset, k: int, as_json: bool) -> None:
    source, epoch, source_row = data.schedule.locate(k)
    row = data.prepared.train[source][source_row]
    pieces = list(_pieces(row, data.tokenizer))
    step, of_batch = divmod(k, data.batch_rows)
    if as_json:
        origin = {"source": source, "epoch": epoch, "source_row": source_row}
        render.emit("row", step=step, batch_row=of_batch, **origin, pieces=pieces)
        return
    click.echo(
        f"\nstep {step} row {of_batch}: `{source}` row {source_row}, epoch {epoch}, "
        f"{int((row['segments'] > 0).sum())} of {len(row['segments'])} tokens"
    )
    for number, text in enumerate(pieces, 1):
        escaped = printable(text).replace("\n", "\\n")
        click.echo(f"  {number}: {escaped}")


def _pieces(row: Row, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of every document piece of a row, its ends marked."""
    segments = row["segments"]
    for number in range(1, int(segments.max(initial=0)) + 1):
        tokens, targets = row["tokens"][segments == number], row["targets"][segments == number]
        begins, ends = tokens[0] == tokenizer.bos_id, targets[-1] == tokenizer.eos_id
        text = tokenizer.decode(tokens[int(begins) :].tolist())
        yield ("<s>" if begins else "…") + text + ("</s>" if ends else "…")


def _show_duplicates(data: Dataset, progress: Progress, as_json: bool) -> None:
    counts = data.duplicates(progress)
    if as_json:
        for name, (within, across) in counts.items():
            render.emit("duplicates", source=name, within=within, across=across)
        return
    render.print_table(
        ["source", ">repeated", ">also in an earlier source"],
        [[name, f"{within:,}", f"{across:,}"] for name, (within, across) in counts.items()],
        title="equal documents",
        note="exact copies, counted and never removed",
    )
