"""`glam tokenizer`: train a tokenizer on a mixture, or look into one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glamcli.cli import render
from glamcli.cli.options import FileOrUrl, json_option, set_option
from glamcli.config import yaml
from glamcli.config.files import display, find, shipped
from glamcli.config.load import load_recipe
from glamcli.config.mixtures import load_mixture
from glamcli.errors import RecipeError, printable
from glamcli.storage import is_url, place

if TYPE_CHECKING:
    from glamcli.data.tokenizer import Tokenizer


@click.group()
def command() -> None:
    """Train a tokenizer on a mixture, or look into one."""


@command.command("train")
@click.argument("recipe_or_mixture")
@click.option("--vocab-size", type=click.IntRange(min=1), help="Pieces.  [default: the recipe's]")
@click.option("--out", type=FileOrUrl(dir_okay=False), help="Model file to write.")
@set_option
@json_option
def train_tokenizer(
    recipe_or_mixture: str,
    vocab_size: int | None,
    out: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a SentencePiece tokenizer on the training documents of a mixture, by its weights.

    Without `--out` it is written to the cache, where training looks for it (and trains it if
    it is not there).
    """
    from glamcli.data.cache import cache_dir, user_cache_dir
    from glamcli.data.split import divide_mixture
    from glamcli.data.vocabulary import open_tokenizer, train_on

    progress = render.make_progress(as_json)
    if _is_mixture(recipe_or_mixture):
        if vocab_size is None or out is None or sets:
            raise RecipeError(
                f"`{recipe_or_mixture}` is a mixture: give `--vocab-size` and `--out`, no `--set`",
                hint="or name a recipe",
            )
        mixture, cache = load_mixture(recipe_or_mixture), user_cache_dir()
    else:
        if vocab_size is not None:
            sets = (*sets, f"data.tokenizer.train_vocab_size={vocab_size}")
        recipe = load_recipe(recipe_or_mixture, sets).recipe
        mixture, cache = load_mixture(recipe.data.mixture), cache_dir(recipe)
        vocab_size = recipe.data.tokenizer.train_vocab_size or recipe.model.vocab_size
        if out is None:
            settings = recipe.data.tokenizer
            if settings.kind == "bytes":
                raise RecipeError(
                    "the recipe's tokenizer is plain bytes, which are not trained",
                    hint="add `--set data.tokenizer.kind=sentencepiece`",
                )
            if settings.path is not None:
                what = f"the recipe's tokenizer is the file {settings.path}"
                raise RecipeError(what, hint="write another with `--out`")
            _show_summary(open_tokenizer(recipe, mixture, cache, progress), as_json)
            return
    sides = divide_mixture(mixture, cache, progress)
    _show_summary(train_on(mixture, vocab_size, sides, out, progress), as_json)
    progress.say(f"recipes use it with `data.tokenizer.path={out}`")


@command.command("show")
@click.argument("file_or_recipe")
@click.argument("text", required=False)
@set_option
@json_option
def show_tokenizer(
    file_or_recipe: str, text: str | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Show the tokenizer of a model file or recipe, and the pieces of TEXT."""
    from glamcli.data.cache import cache_dir
    from glamcli.data.tokenizer import load_sentencepiece
    from glamcli.data.vocabulary import open_tokenizer

    path = place(file_or_recipe)
    if (is_url(path) or os.path.isfile(path)) and path.suffix not in (".yaml", ".yml", ".json"):
        if sets:
            raise RecipeError("`--set` changes a recipe, but this is a tokenizer file")
        tokenizer = load_sentencepiece(path)
    else:
        recipe = load_recipe(file_or_recipe, sets).recipe
        mixture, progress = load_mixture(recipe.data.mixture), render.make_progress(as_json)
        tokenizer = open_tokenizer(recipe, mixture, cache_dir(recipe), progress)
    if text is None:
        _show_summary(tokenizer, as_json)
        return
    ids = tokenizer.encode(text)
    pieces = [printable(tokenizer.piece(token_id)) for token_id in ids]
    num_bytes = len(text.encode("utf-8", "replace"))
    if as_json:
        render.emit("text", ids=ids, pieces=pieces, bytes=num_bytes)
        return
    render.print_table(
        [">id", "piece"],
        [[str(token_id), piece] for token_id, piece in zip(ids, pieces, strict=True)],
        note=f"{len(ids)} tokens, {num_bytes} bytes, {num_bytes / max(len(ids), 1):.2f} bytes "
        "per token",
    )


def _is_mixture(name_or_path: str) -> bool:
    """Whether a name or path means a mixture; a name of both is the recipe's."""
    if name_or_path in shipped("recipes"):
        return False
    if name_or_path in shipped("data_mixtures"):
        return True
    path = find("recipes", name_or_path)
    return any(key == "sources" for key in yaml.plain(yaml.read_tree(path, display(path))))


def _show_summary(tokenizer: Tokenizer, as_json: bool) -> None:
    facts = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.fingerprint,
        "file": getattr(tokenizer, "name", None),
    }
    if as_json:
        render.emit("tokenizer", **facts)
        return
    for name, value in facts.items():
        if value is not None:
            click.echo(printable(f"{name:<10}  {value}"))
