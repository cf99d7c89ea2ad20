"""A recipe's data for every program: tokenizer, prepared rows and their schedule.

Nothing is decided here: what is missing is made by `vocabulary.py` and `prepare.py`, in the order
of `mixture.py`. jax is imported (by grain) only when batches are read.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from glamcli.config.mixtures import Mixture, load_mixture, source_weights
from glamcli.config.schema import Recipe
from glamcli.data.cache import cache_dir, shared_cache, writing_cache
from glamcli.data.mixture import Schedule
from glamcli.data.prepare import last_rows, prepare
from glamcli.data.prepared import Prepared
from glamcli.data.rows import Rows, read_rows_meta
from glamcli.data.sources import documents, files
from glamcli.data.tokenizer import Tokenizer
from glamcli.data.vocabulary import open_tokenizer
from glamcli.errors import DataError
from glamcli.progress import Progress

if TYPE_CHECKING:
    from glamcli.data.stream import HostBatch
    from glamcli.hosts.join import Host


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
    read_seconds: dict[str, float] = field(default_factory=dict, compare=False)
    """by source, what reading its rows for `batches` took so far."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names in the order of the ids in a batch's `source`."""
        return self.schedule.names

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data, for JSON: SHA-256 of tokenizer and rows."""
        return {"tokenizer": self.tokenizer.fingerprint, "sources": self.prepared.fingerprints}

    def batches(
        self, start_step: int, steps: int | None = None, here: Sequence[range] | None = None
    ) -> AbstractContextManager[Iterator[HostBatch]]:
        """Batches from `start_step` on, read ahead in threads until the `with` block ends.

        `here` are the rows of every batch that this process reads (by default all).
        """
        from glamcli.data.stream import BatchReader, read_ahead  # grain imports jax

        rows, size = self.prepared.train, self.batch_rows
        where = (start_step, steps, here, self.read_seconds)
        return read_ahead(BatchReader(self.schedule, rows, size, self.vocab_size, *where))

    def heldout_documents(self) -> dict[str, list[str]]:
        """The held-out documents by source."""
        return {name: self.prepared.heldout_documents(name) for name in self.source_names}

    def summary(self, steps: int) -> list[dict[str, Any]]:
        """The mixture's table for a run of `steps`, one source per line. `weight_asked` is its
        share of rows at step 0 by the mixture file, `weight_realised` that over the whole run;
        what the tokenizer changed or had no pieces for counts held-out documents as well."""
        total = steps * self.batch_rows
        counts, epochs = self.schedule.counts(0, total), self.schedule.epochs(total)
        weights = source_weights(self.mixture)
        lines = []
        for name in self.source_names:
            train, heldout = self.prepared.train[name], self.prepared.heldout[name]
            both = train.counts + heldout.counts
            lines.append(
                {
                    "name": name,
                    "weight_asked": weights[name],
                    "weight_realised": counts[name] / total,
                    "num_documents": train.counts.num_documents,
                    "num_rows": len(train),
                    "num_tokens": train.counts.num_tokens,
                    "utilisation": train.utilisation,
                    "heldout_documents": heldout.counts.num_documents,
                    "heldout_rows": len(heldout),
                    "num_changed": both.num_changed,
                    "num_unknown": both.num_unknown,
                    "run_rows": counts[name],
                    "run_tokens": epochs[name] * train.counts.num_tokens,
                    "epochs": epochs[name],
                }
            )
        return lines

    def duplicates(self, progress: Progress) -> dict[str, tuple[int, int]]:
        """Per source: documents equal to an earlier one of it, and those of an earlier source.

        Reads every source once and keeps 8 bytes per document: among 2^32 documents about one pair
        is taken for equal that is not.
        """
        before = np.zeros(0, np.uint64)
        counts = {}
        for name, source in self.mixture.sources.items():
            hashes = bytearray()
            with progress.phase(f"reading `{name}`", None, "documents") as phase:
                for text in documents(source, name):
                    data = text.encode("utf-8", "surrogatepass")
                    hashes += hashlib.blake2b(data, digest_size=8).digest()
                    phase.advance()
            found = np.frombuffer(hashes, np.uint64)
            unique = np.unique(found)
            across = int(np.isin(unique, before, assume_unique=True).sum())
            counts[name] = (len(found) - len(unique), across)
            before = np.union1d(before, unique)
        return counts


def open_data(recipe: Recipe, progress: Progress) -> Dataset:
    """The data of a recipe, prepared if it is not yet.

    Raises: DataError for sources that cannot be read (all of them at once, as far as their first
        documents show it), damaged rows, an empty source with weight, a cache folder that cannot
        be written, and a tokenizer with more ids than the model; RecipeError for a mixture that
        contradicts itself.
    """
    mixture = load_mixture(recipe.data.mixture)
    cache = cache_dir(recipe)
    try:
        tokenizer = open_tokenizer(recipe, mixture, cache, progress)
        if tokenizer.vocab_size > recipe.model.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids, more than `model.vocab_size` "
                f"{recipe.model.vocab_size}",
                hint=f"use `model.vocab_size` {tokenizer.vocab_size} or more",
            )
        with writing_cache(cache):
            prepared = prepare(recipe, mixture, tokenizer, cache, progress)
    except DataError as error:
        all_of_them = _with_other_problems(error, mixture)
        if all_of_them is error:
            raise
        raise all_of_them from error
    # A stage starts with the first row of its step.
    stages = [(0, {name: source.weight for name, source in mixture.sources.items()})]
    stages += [(stage.from_step * recipe.batch.rows, stage.weights) for stage in mixture.stages]
    num_rows = {name: len(prepared.train[name]) for name in mixture.sources}
    return Dataset(
        tokenizer=tokenizer,
        mixture=mixture,
        prepared=prepared,
        schedule=Schedule(recipe.seed, stages, num_rows),
        batch_rows=recipe.batch.rows,
        vocab_size=recipe.model.vocab_size,
    )


def _with_other_problems(error: DataError, mixture: Mixture) -> DataError:
    """The error with those of every source whose first document cannot be read."""
    problems: dict[str, DataError] = {}
    for name, source in mixture.sources.items():
        try:
            unfiltered = source.model_copy(update={"where": {}, "min_chars": 0})
            next(documents(unfiltered, name), None)
        except DataError as other:
            problems[other.what] = other
    hint: str | None = (
        "the comments of the mixture file say what belongs there; a copy of it "
        "(`data.mixture=./mine.yaml`) may name other paths"
    )
    title = f"{len(problems)} of {len(mixture.sources)} sources cannot be read"
    if error.what not in problems:
        problems = {error.what: error, **problems}
        title, hint = f"{len(problems)} problems with the data", None
    if len(problems) == 1:
        return error
    listed = [
        f"  {each.what}" + (f" ({each.hint})" if each.hint else "") for each in problems.values()
    ]
    return DataError("\n".join([f"{title}:", *listed]), hint)


def open_data_together(recipe: Recipe, progress: Progress, host: Host) -> Dataset:
    """The recipe's data, opened by every process of a run. Where processes share a cache, a folder
    or behind a URL, the first one prepares and the others wait; one with a folder of its own
    prepares for itself.

    Raises: what `open_data` raises.
    """
    if host.count == 1:
        return open_data(recipe, progress)
    cache, shared = cache_dir(recipe), shared_cache(recipe)
    with writing_cache(cache):
        is_shared = host.shares(cache)[host.index] or shared is not None
    waits = is_shared and not host.is_first
    if waits:
        progress.say(f"waiting for process 0, which prepares the data in {shared or cache}")
        host.wait("data")
    dataset = open_data(recipe, progress)
    if not waits:
        with progress.phase("waiting for the data of the other processes"):
            host.wait("data")
    return dataset


def known_tokens(recipe: Recipe) -> dict[str, int]:
    """Training tokens of every source as its rows were when such data was last opened; reads no
    document, uses no network and makes nothing. A local source whose files have other names or
    sizes by now is left out, and so is one whose rows are gone."""
    mixture, cache = load_mixture(recipe.data.mixture), cache_dir(recipe)
    known: dict[str, int] = {}
    for name, folder in last_rows(recipe, mixture, cache)[1].items():
        with contextlib.suppress(DataError):
            source = mixture.sources[name]
            made_of = [entry[:2] for entry in read_rows_meta(folder).inputs.files]
            is_remote = "://" in (source.path or "")
            if is_remote or made_of == [(f.name, f.num_bytes) for f in files(source, name)]:
                known[name] = Rows(folder, "train").counts.num_tokens
    return known
