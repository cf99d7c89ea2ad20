"""Held-out loss per source: which rows are scored, and the baseline of token frequencies.

The baseline is the entropy of a source's single tokens, counted on its training rows: the best
that a model which ignores context can score on such text. A loss clearly below it is learned from
context. Counted on a handful of held-out rows it would be too low: few tokens lack the long tail.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from glamcli.data.open import Dataset
from glamcli.data.rows import Rows
from glamcli.progress import Progress

ENTROPY_ROWS = 512  # training rows counted for the baseline, per source


class Heldout:
    """Held-out rows of every source, at most `limit` each, in batches of `batch_rows`.

    The last batch is filled with padding, so that one compiled program scores all of them.
    """

    def __init__(
        self, rows: Mapping[str, Rows], train: Mapping[str, Rows], limit: int, batch_rows: int
    ):
        self.names = tuple(rows)
        self.batch_rows = batch_rows
        self._train = train
        self._rows = {name: _spread(rows[name], limit) for name in self.names}

    @property
    def num_batches(self) -> int:
        return -(-sum(map(len, self._rows.values())) // self.batch_rows)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches of one evaluation, always the same ones."""
        every = [(i, row) for i, name in enumerate(self.names) for row in self._rows[name]]
        for first in range(0, len(every), self.batch_rows):
            part = every[first : first + self.batch_rows]
            blank = {key: np.zeros_like(value) for key, value in part[0][1].items()}
            part += [(0, blank)] * (self.batch_rows - len(part))
            batch = {key: np.stack([row[key] for _, row in part]) for key in blank}
            yield {**batch, "source": np.array([i for i, _ in part], np.int32)}

    @cached_property
    def unigram_nats(self) -> dict[str, float]:
        """Entropy of the single target tokens of each scored source, in nats per token."""
        return {
            name: _entropy(_spread(self._train[name], ENTROPY_ROWS))
            for name, rows in self._rows.items()
            if rows
        }


def mean_nats(names: tuple[str, ...], sums: list[Mapping[str, Any]]) -> dict[str, float]:
    """Loss per source in nats per token, from the sums of every batch; a source without held-out
    targets is left out."""
    nats = np.sum([np.asarray(s["source_nats"], np.float64) for s in sums], axis=0)
    targets = np.sum([np.asarray(s["source_targets"], np.int64) for s in sums], axis=0)
    return {name: float(nats[i] / targets[i]) for i, name in enumerate(names) if targets[i] > 0}


def warn_of_unscored(dataset: Dataset, steps: int, progress: Progress) -> None:
    """Warns of sources that are trained on and have no held-out rows, unless the mixture holds
    none out."""
    if dataset.mixture.heldout_frac == 0:
        return
    for line in dataset.summary(steps):
        if line["run_rows"] and not line["heldout_rows"]:
            is_text = dataset.mixture.sources[line["name"]].kind == "text"
            progress.warn(
                f"source `{line['name']}` has no held-out loss: too few documents to hold one out"
                + "; `separator: blank_line` makes documents of paragraphs" * is_text
            )


def _spread(rows: Rows, limit: int) -> list[dict[str, np.ndarray]]:
    """Rows at even distances, because neighbours often belong to one long document."""
    count = min(limit, len(rows))
    return [dict(rows[i * len(rows) // count]) for i in range(count)]


def _entropy(rows: list[dict[str, np.ndarray]]) -> float:
    targets = np.concatenate([row["targets"][row["segments"] != 0] for row in rows])
    counts = np.unique(targets, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-np.sum(share * np.log(share)))
