"""The one door to a recipe's data: tokenizer, prepared rows and their schedule, ready to read.

Nothing here decides anything: what is missing is made by `vocabulary.py` and `prepare.py`, in the
order of `mixture.py`. jax stays out, also by way of grain, until batches are asked for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glamcli import atomic
from glamcli.config.mixtures import Mixture, load_mixture, source_weights
from glamcli.config.schema import Recipe
from glamcli.data.cache import cache_dir, cache_path, json_digest, writing_cache
from glamcli.data.mixture import Schedule
from glamcli.data.prepare import Prepared, prepare
from glamcli.data.rows import Rows, read_meta
from glamcli.data.sources import READ_SETTINGS, files
from glamcli.data.tokenizer import Tokenizer
from glamcli.data.vocabulary import open_tokenizer
from glamcli.errors import DataError
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.data.stream import Stream
    from glamcli.hosts.join import Host


@dataclass(frozen=True)
class SourceSummary:
    """One line of the mixture's table."""

    name: str
    weight_asked: float
    """share of rows at step 0 by the mixture file, normalised."""
    weight_realised: float
    """share of rows over the whole run, stages included."""
    num_documents: int
    num_rows: int
    num_tokens: int
    utilisation: float
    heldout_documents: int
    heldout_rows: int
    num_changed: int
    """documents that the tokenizer does not give back as they were, held-out ones included."""
    num_unknown: int
    """tokens for text that the tokenizer has no pieces for, held-out ones included."""
    run_rows: int
    run_tokens: float
    epochs: float


@dataclass(frozen=True)
class Dataset:
    """Everything a program needs of a recipe's data."""

    tokenizer: Tokenizer
    mixture: Mixture
    prepared: Prepared
    schedule: Schedule
    batch_rows: int
    vocab_size: int
    """of the model; the tokenizer may use fewer."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names in the order of the ids in a batch's `source`."""
        return self.schedule.names

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data, for JSON: SHA-256 of tokenizer and rows."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "sources": dict(self.prepared.fingerprints),
        }

    def batches(
        self, start_step: int, steps: int | None = None, here: Sequence[range] | None = None
    ) -> Stream:
        """Batches from `start_step` on, read ahead in threads; close it when done.

        `here` are the rows of every batch that this process reads (by default all).
        """
        from glamcli.data.stream import batches  # grain imports jax

        return batches(
            self.schedule,
            self.prepared.train,
            self.batch_rows,
            start_step,
            steps,
            here,
            vocab_size=self.vocab_size,
        )

    def heldout_documents(self) -> dict[str, list[str]]:
        """The held-out documents by source."""
        return {name: self.prepared.heldout_documents(name) for name in self.source_names}

    def summary(self, steps: int) -> list[SourceSummary]:
        """The mixture's table for a run of `steps`."""
        total = steps * self.batch_rows
        counts, epochs = self.schedule.counts(0, total), self.schedule.epochs(total)
        weights = source_weights(self.mixture)
        lines = []
        for name in self.source_names:
            train, heldout = self.prepared.train[name], self.prepared.heldout[name]
            lines.append(
                SourceSummary(
                    name=name,
                    weight_asked=weights[name],
                    weight_realised=counts[name] / total,
                    num_documents=train.meta.num_documents,
                    num_rows=len(train),
                    num_tokens=train.meta.num_tokens,
                    utilisation=train.meta.utilisation,
                    heldout_documents=heldout.meta.num_documents,
                    heldout_rows=len(heldout),
                    num_changed=train.meta.num_changed + heldout.meta.num_changed,
                    num_unknown=train.meta.num_unknown + heldout.meta.num_unknown,
                    run_rows=counts[name],
                    run_tokens=epochs[name] * train.meta.num_tokens,
                    epochs=epochs[name],
                )
            )
        return lines


def open_data(recipe: Recipe, progress: Progress) -> Dataset:
    """The data of a recipe, prepared if it is not yet.

    Raises: DataError for sources that cannot be read, damaged rows, an empty source with weight,
        a cache folder that cannot be written, and a tokenizer with more ids than the model;
        RecipeError for a mixture that makes no sense.
    """
    mixture = load_mixture(recipe.data.mixture)
    check_sources(mixture)
    cache = cache_dir(recipe)
    tokenizer = open_tokenizer(recipe, mixture, cache, progress)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than `model.vocab_size` "
            f"{recipe.model.vocab_size}",
            hint=f"use `model.vocab_size` {tokenizer.vocab_size} or more",
        )
    with writing_cache(cache):
        prepared = prepare(recipe, mixture, tokenizer, cache, progress)
    _note_rows(_record(recipe, mixture, cache), prepared)
    return Dataset(
        tokenizer=tokenizer,
        mixture=mixture,
        prepared=prepared,
        schedule=make_schedule(recipe, mixture, prepared),
        batch_rows=recipe.batch.rows,
        vocab_size=recipe.model.vocab_size,
    )


def open_data_together(recipe: Recipe, progress: Progress, host: Host) -> Dataset:
    """The recipe's data, opened by every process of a run. Where processes share a cache folder,
    the first one prepares and the others wait; one with a folder of its own prepares for itself.

    Raises: what `open_data` raises.
    """
    if host.count == 1:
        return open_data(recipe, progress)
    cache = cache_dir(recipe)
    with writing_cache(cache):
        waits = host.shares(cache)[host.index] and not host.is_first
    if waits:
        progress.say(f"waiting for process 0, which prepares the data in {cache}")
        host.wait("data")
    dataset = open_data(recipe, progress)
    if not waits:
        with progress.phase("waiting for the data of the other processes"):
            host.wait("data")
    return dataset


def known_tokens(recipe: Recipe) -> dict[str, int]:
    """Training tokens of every source as its rows were when such data was last opened; reads no
    document, asks no network and makes nothing. A local source whose files have other names or
    sizes by now is left out, and so is one whose rows are gone."""
    mixture, cache = load_mixture(recipe.data.mixture), cache_dir(recipe)
    found: dict[str, int] = {}
    for name, folder in _read_record(_record(recipe, mixture, cache)).items():
        with contextlib.suppress(DataError):
            rows, source = cache_path(cache, "rows", folder), mixture.sources[name]
            made_of = [entry[:2] for entry in read_meta(rows)["inputs"]["files"]]
            if "://" in (source.path or "") or made_of == [
                [file.name, file.num_bytes] for file in files(source, name)
            ]:
                found[name] = Rows(rows, "train").meta.num_tokens
    return found


def _record(recipe: Recipe, mixture: Mixture, cache: Path) -> Path:
    """Where it is noted which rows these settings were given; what is in the files is not asked."""
    settings = {
        "tokenizer": recipe.data.tokenizer.model_dump(mode="json"),
        "vocab_size": recipe.model.vocab_size,
        "packing": recipe.data.packing,
        "row_tokens": recipe.batch.row_tokens,
        "heldout_frac": mixture.heldout_frac,
        "sources": {
            name: source.model_dump(mode="json", include={"path", *READ_SETTINGS})
            for name, source in mixture.sources.items()
        },
    }
    return cache_path(cache, "mixtures", json_digest(settings)[:16])


def _read_record(record: Path) -> dict[str, str]:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return {}


def _note_rows(record: Path, prepared: Prepared) -> None:
    """Notes the folders of the rows for `known_tokens`, which can do without."""
    folders = {name: rows.folder.name for name, rows in prepared.train.items()}
    if _read_record(record) == folders:
        return
    with contextlib.suppress(OSError):
        atomic.write(record, json.dumps(folders) + "\n")


def make_schedule(recipe: Recipe, mixture: Mixture, prepared: Prepared) -> Schedule:
    """The order of rows of a run; a stage starts with the first row of its step."""
    stages = [(0, {name: source.weight for name, source in mixture.sources.items()})]
    stages += [(stage.from_step * recipe.batch.rows, stage.weights) for stage in mixture.stages]
    num_rows = {name: len(prepared.train[name]) for name in mixture.sources}
    return Schedule(recipe.seed, stages, num_rows)


def check_sources(mixture: Mixture) -> None:
    """Looks for the files of every source, so that all missing ones are told at once.

    Raises: DataError naming each source without files and the pattern that found none.
    """
    missing = []
    for name, source in mixture.sources.items():
        try:
            files(source, name)
        except DataError as error:
            missing.append(error)
    if len(missing) == 1:
        raise missing[0]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(mixture.sources)} sources cannot be read:\n"
            + "\n".join(
                f"  {error.what}" + (f" ({error.hint})" if error.hint else "") for error in missing
            ),
            hint="the comments of the mixture file say what belongs there; a copy of it "
            "(`data.mixture=./mine.yaml`) may name other paths",
        )
