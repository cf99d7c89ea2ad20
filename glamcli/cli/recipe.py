"""`glam recipe`: list, show, check, compare and start recipes. Imports no jax."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from glamcli.cli.options import json_option, set_option
from glamcli.config.dump import as_yaml, dump_lines, json_schema
from glamcli.config.load import Loaded, leaves, load_mixture, load_recipe, shipped
from glamcli.config.mixtures import source_weights, tokens_by_source
from glamcli.config.origins import short_origins
from glamcli.config.schema import Recipe
from glamcli.config.sizes import count, flops_per_token, short, tokens_per_step, tokens_total
from glamcli.config.stages import schedule
from glamcli.errors import RecipeError, printable


@click.group()
def command() -> None:
    """List, show, check, compare and start recipes.

    RECIPE is a shipped name, a file, or a run folder.
    """


@command.command("list")
@json_option
def _list(as_json: bool) -> None:
    """List the recipes that come with the program."""
    recipes = {name: load_recipe(name, check=False).recipe for name in shipped("recipes")}
    sizes = {name: count(recipe) for name, recipe in recipes.items()}
    rows = [(k, sizes[k].total, sizes[k].active, recipe.about) for k, recipe in recipes.items()]
    if as_json:
        _print_json(("name", "total", "active", "about"), rows)
        return
    cells = [(name, short(total), short(active), about) for name, total, active, about in rows]
    rows = [("recipe", "weights", "active", "about"), *cells]
    click.echo(printable("\n".join(_aligned(rows, right=(1, 2)))))


@command.command("show")
@click.argument("recipe")
@click.option("--origins", is_flag=True, help="Show where each value comes from.")
@set_option
@json_option
def _show(recipe: str, origins: bool, sets: tuple[str, ...], as_json: bool) -> None:
    """Show RECIPE in full: every setting, and what follows from it.

    The output is itself a recipe: everything but settings is a comment.
    """
    loaded = load_recipe(recipe, sets)
    if as_json:
        click.echo(json.dumps(_described(loaded, origins)))
        return
    lines = list(dump_lines(loaded.recipe))
    width = max(len(line) for line, key in lines if key is not None and len(line) <= 60)
    for line, key in lines:
        origin = loaded.origins[key] if origins and key is not None else None
        click.echo(printable(f"{line:{width}}  # {origin}" if origin else line))
    for line in _facts(loaded):
        click.echo(printable(f"# {line}".rstrip()))


@command.command("check")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@set_option
def _check(recipes: tuple[str, ...], sets: tuple[str, ...]) -> None:
    """Check RECIPE and its mixture; every problem is listed at once."""
    failed: list[RecipeError] = []
    for recipe in recipes:
        try:
            load_recipe(recipe, sets)
        except RecipeError as error:
            failed.append(error)
        else:
            click.echo(printable(f"{recipe}: ok"))
    if len(failed) == 1:
        raise failed[0]
    if failed:
        lines = (f"{error.what}" + (f" ({error.hint})" if error.hint else "") for error in failed)
        raise RecipeError(f"{len(failed)} recipes have problems\n" + "\n".join(lines))


@command.command("diff")
@click.argument("a")
@click.argument("b")
@json_option
def _diff(a: str, b: str, as_json: bool) -> None:
    """Show the settings in which recipes A and B differ, and where each was set."""
    sides = load_recipe(a, check=False), load_recipe(b, check=False)
    values = [dict(leaves(side.recipe)) for side in sides]
    rows = []
    for key in dict.fromkeys([*values[0], *values[1]]):
        mine, theirs = (as_yaml(side[key]) if key in side else "-" for side in values)
        if mine != theirs and key not in ("about", "notes"):
            origins = [side.origins.get(key, "-") for side in sides]
            rows.append((key, mine, origins[0], theirs, origins[1]))
    if as_json:
        _print_json(("key", "a", "a_origin", "b", "b_origin"), rows)
    elif not rows:
        click.echo("no differences")
    else:
        ends = short_origins([place for row in rows for place in (row[2], row[4])])
        cells = [(row[0], row[1], row[3], f"{ends[row[2]]} | {ends[row[4]]}") for row in rows]
        click.echo(printable("\n".join(_aligned([("setting", a, b, "set at"), *cells]))))


@command.command("new")
@click.argument("name")
@click.option("--from", "parent", required=True, help="The recipe to start from.")
def _new(name: str, parent: str) -> None:
    """Start a recipe: write NAME.yaml here, based on another recipe."""
    name = name.removesuffix(".yaml")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise RecipeError(
            f"`{name}` cannot be the name of a recipe", hint="use letters, digits, `.`, `_` and `-`"
        )
    if name in shipped("recipes"):
        raise RecipeError(f"a shipped recipe is called `{name}`", hint="choose another name")
    loaded = load_recipe(parent)
    path = Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_template(loaded, parent))
    except FileExistsError as error:
        raise RecipeError(f"{path} exists already", hint="choose another name") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {(error.strerror or '').lower()}") from error
    click.echo(f"wrote {path}: edit it, then `glam recipe check ./{path}`, `glam train ./{path}`")


@command.command("schema")
def _schema() -> None:
    """Print the JSON Schema of recipe files, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


def _template(loaded: Loaded, parent: str) -> str:
    """A child recipe with the settings most often changed, commented out at their values."""
    recipe = loaded.recipe
    common = {
        "model": ("num_layers", "model_dim", "ffn_dim", "num_heads", "head_dim"),
        "moe": ("num_experts", "capacity_factor", "group_tokens"),
        "batch": ("rows", "row_tokens", "accumulate"),
        "optimizer": ("learning_rate", "hold_steps"),
        "train": ("steps", "remat"),
        "data": ("mixture",),
    }
    schema_path = next(iter(shipped("recipes").values())).parent / "schema.json"
    lines = [
        f"# yaml-language-server: $schema={schema_path}",
        f"# Everything else comes from the parent; see `glam recipe show {parent}`.",
        f"extends: {as_yaml(parent)}",
        f"about: {as_yaml(f'based on {loaded.name}')}",
        "# The values below are the parent's. To change one, remove `#` there and at its section.",
    ]
    for section, names in common.items():
        settings = getattr(recipe, section)
        if settings is not None:
            lines.append(f"# {section}:")
            lines += [f"#   {name}: {as_yaml(getattr(settings, name))}" for name in names]
    return "".join(line + "\n" for line in lines)


def _described(loaded: Loaded, origins: bool) -> dict[str, Any]:
    """Everything `show` prints, as one object."""
    recipe = loaded.recipe
    sizes, flops = count(recipe), flops_per_token(recipe)
    found: dict[str, Any] = {
        "name": loaded.name,
        "path": str(loaded.path),
        "recipe": recipe.model_dump(mode="json"),
        "parameters": {"total": sizes.total, "active": sizes.active, **asdict(sizes)},
        "flops_per_token": {
            name: getattr(flops, name)
            for name in ("forward", "training", "training_padded", *asdict(flops))
        },
        "tokens": tokens_total(recipe),
        "pipeline": _pipeline(recipe),
        "sources": list(_sources(loaded)),
    }
    if origins:
        found["origins"] = loaded.origins
    return found


def _pipeline(recipe: Recipe) -> dict[str, Any] | None:
    """The schedule with its idle share in both conventions; None with one stage."""
    found = schedule(recipe)
    return found and {
        **asdict(found),
        "ticks": found.ticks,
        "bubble_of_total_frac": found.bubble_of_total,
        "bubble_of_ideal_frac": found.bubble_of_ideal,
    }


def _sources(loaded: Loaded) -> Iterator[dict[str, Any]]:
    """What the run sees of each source; epochs where its size is known, from its prepared rows or
    as published."""
    recipe = loaded.recipe
    mixture = load_mixture(recipe.data.mixture)
    weights = source_weights(mixture)
    seen = tokens_by_source(mixture, recipe.train.steps, tokens_per_step(recipe))
    counted: dict[str, int] = {}
    if any(source.tokens is None for source in mixture.sources.values()):
        from glamcli.data.open import known_tokens

        counted = known_tokens(recipe)
    for name, source in mixture.sources.items():
        size = counted.get(name) or source.tokens
        yield {
            "source": name,
            "weight": weights[name],
            "tokens": round(seen[name]),
            "published_tokens": source.tokens,
            "prepared_tokens": counted.get(name),
            "epochs": seen[name] / size if size else None,
        }


def _facts(loaded: Loaded) -> Iterator[str]:
    """The lines after the settings: parameters, FLOPs, tokens, sources."""
    recipe = loaded.recipe
    sizes, flops = count(recipe), flops_per_token(recipe)
    yield ""
    yield f"parameters   {sizes.total:,}"
    yield f"active       {sizes.active:,} per token"
    rows = [(kind.replace("_", " "), f"{size:,}") for kind, size in asdict(sizes).items() if size]
    yield from (f"  {line}" for line in _aligned(rows, right=(1,)))
    yield ""
    yield f"FLOPs per token, forward    {short(flops.forward)}"
    yield f"FLOPs per token, training   {short(flops.training)}"
    parts = {"weights": flops.weights, "attention scores": flops.scores, "logits": flops.logits}
    rows = [(f"forward, {kind}", short(size)) for kind, size in parts.items()]
    if recipe.moe:
        rows.append(("training, with every expert slot computed", short(flops.training_padded)))
    yield from (f"  {line}" for line in _aligned(rows, right=(1,)))
    yield ""
    yield f"tokens per step   {tokens_per_step(recipe):,}"
    yield f"tokens of a run   {tokens_total(recipe):,}"
    yield ""
    if (pipeline := schedule(recipe)) is not None:
        yield (
            f"pipeline   {pipeline.stages} stages x {pipeline.repeats} repeats, "
            f"{pipeline.microbatches} microbatches, {pipeline.ticks} ticks"
        )
        yield (
            f"bubble     {pipeline.bubble_of_total:.1%} of the layers' time, "
            f"{pipeline.bubble_of_ideal:.1%} of what it would be without"
        )
        yield ""
    lines = [["source", "weight", "tokens seen", "size", "epochs"]]
    for row in _sources(loaded):
        size, epochs = row["prepared_tokens"] or row["published_tokens"], row["epochs"]
        known = [short(size), f"{epochs:.3g}"] if size else ["-", "-"]
        lines.append([row["source"], f"{row['weight']:.4g}", short(row["tokens"]), *known])
    yield from _aligned(lines, right=(1, 2, 3, 4))
    if any(line[-1] == "-" for line in lines):
        yield "-: known after preparation (`glam data prepare`)"


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Rows as lines of columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _print_json(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for row in rows:
        click.echo(json.dumps(dict(zip(names, row, strict=True))))
