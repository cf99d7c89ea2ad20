"""Mixture files: reading them, the rules between their fields, and what a run sees of them."""

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from glamcli.config import yaml
from glamcli.config.explain import Problem, place_of, refuse, validate
from glamcli.config.files import absolute, display, find
from glamcli.config.settings import Count, CountOrZero, Fraction, NotNegative, Prose, Settings
from glamcli.config.yaml import shown
from glamcli.storage import place


class Source(Settings):
    """One weighted source of documents in a mixture file."""

    kind: Literal["embedded", "jsonl", "text", "array_record", "tfds"]
    path: str | None = None
    """file, glob or folder; local, or remote by URL (gs://, s3://, https://)."""
    weight: NotNegative
    """share of training rows (rows, hence tokens); weights are relative."""
    about: Prose = ""
    field: str = "text"
    """the field that holds a document, for jsonl, array_record and tfds."""
    split: str | None = None
    """tfds: the split, for example `train` or `train[:10%]`."""
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """keep only documents whose fields equal these values; one without the field is left out, and
    a field that no document has is an error."""
    min_chars: CountOrZero = 0
    """drop shorter documents."""
    separator: Literal["file", "blank_line", "line"] = "file"
    """text: what ends a document."""
    tokens: Count | None = None
    """published size in tokens, for planning; preparation counts the real ones."""
    max_documents: Count | None = None


class Stage(Settings):
    """Weights that hold from a step on."""

    from_step: CountOrZero
    weights: dict[str, NotNegative]


class Mixture(Settings):
    """Weighted sources. Row k of a run is a pure function of (seed, stages, k)."""

    about: Prose = ""
    sources: dict[str, Source] = Field(min_length=1)
    heldout_frac: Fraction = 0.01
    """documents of every source kept out of training, chosen by a hash of their text."""
    stages: tuple[Stage, ...] = ()
    """changes of weights at later steps; a source left out gets weight 0 from there on."""


def load_mixture(name_or_path: str | Path) -> Mixture:
    """A mixture of a shipped name or a path.

    Local source paths become absolute: they are relative to the mixture file.
    Raises: RecipeError with every problem.
    """
    path = find("data_mixtures", str(name_or_path))
    root = yaml.read_tree(path, display(path))
    mixture = validate(root, Mixture)
    wrong = _contradictions(mixture)
    refuse([Problem(place_of(root, *keys), what, hint) for keys, what, hint in wrong])
    sources = {}
    for name, source in mixture.sources.items():
        if source.path is not None and source.kind != "embedded":
            folder = path.parent.absolute()
            # Only what is written in the file is a pattern, not its folder.
            if any(mark in source.path for mark in "*?["):
                folder = place(glob.escape(str(folder)))
            source = source.model_copy(update={"path": absolute(source.path, folder)})
        sources[name] = source
    return mixture.model_copy(update={"sources": sources})


def _contradictions(mixture: Mixture) -> Iterator[tuple[tuple[str | int, ...], str, str | None]]:
    """(path of keys, what, hint) of every contradiction in a mixture."""
    for name, source in mixture.sources.items():
        if not name.isprintable():
            yield ("sources", name), f"`{shown(name)}` is not a name: it must be one line", None
        if source.path is None:
            what = f"source `{name}` is {source.kind}, which needs a `path`"
            yield ("sources", name), what, None
        if source.split is not None and source.kind != "tfds":
            what = f"source `{name}` has a `split`, which only tfds has"
            yield ("sources", name, "split"), what, None
        if source.where and source.kind in ("embedded", "text"):
            what = f"source `{name}` has `where`, but {source.kind} has no fields"
            yield ("sources", name, "where"), what, None
    if not any(source.weight for source in mixture.sources.values()):
        yield ("sources",), "the weights of all sources are 0", None
    before = 0
    for number, stage in enumerate(mixture.stages):
        if stage.from_step <= before:
            what = (
                "stages come in order and the sources' own weights are the first, so this "
                f"`from_step` must be above {before}, not {stage.from_step}"
            )
            yield ("stages", number, "from_step"), what, None
        before = max(before, stage.from_step)
        hint = "sources: " + ", ".join(f"`{each}`" for each in mixture.sources)
        for name in (each for each in stage.weights if each not in mixture.sources):
            yield ("stages", number, "weights", name), f"no source is called `{name}`", hint
        if not any(stage.weights.values()):
            yield ("stages", number, "weights"), "the weights of this stage are all 0", None


def source_weights(mixture: Mixture) -> dict[str, float]:
    """Share of every source at the start of a run: sums to 1."""
    return _shares({name: source.weight for name, source in mixture.sources.items()})


def tokens_by_source(mixture: Mixture, steps: int, tokens_per_step: int) -> dict[str, float]:
    """Expected tokens of every source over a run, stages included (GLaM Table 3)."""
    stages = [(0, source_weights(mixture))]
    stages += [(stage.from_step, _shares(stage.weights)) for stage in mixture.stages]
    seen = dict.fromkeys(mixture.sources, 0.0)
    for number, (start, shares) in enumerate(stages):
        end = stages[number + 1][0] if number + 1 < len(stages) else steps
        num_steps = max(0, min(end, steps) - start)
        for name, share in shares.items():
            seen[name] += share * num_steps * tokens_per_step
    return seen


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
