"""Held-out loss: every row once, padding counts for nothing, entropy by hand."""

import math

import numpy as np
import pytest

from glamcli.train.heldout import Heldout, mean_nats

LENGTH = 4


def rows(*targets: list[int]):
    """Rows with these targets, padded; inputs are the target plus 100."""
    made = []
    for real in targets:
        padding = [0] * (LENGTH - len(real))
        made.append(
            {
                "tokens": np.array([t + 100 for t in real] + padding, np.int32),
                "targets": np.array(real + padding, np.int32),
                "segments": np.array([1] * len(real) + padding, np.int32),
            }
        )
    return made


def test_batches_hold_every_row_once_with_its_source_and_padding_behind():
    heldout = Heldout({"web": rows([1], [2], [3]), "books": rows([4], [5])}, {}, 9, batch_rows=2)
    batches = list(heldout.batches())
    assert heldout.num_batches == len(batches) == 3
    seen = [
        (int(source), int(target[0]))
        for batch in batches
        for source, target, segment in zip(
            batch["source"], batch["targets"], batch["segments"], strict=True
        )
        if segment.any()
    ]
    assert seen == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)]
    assert all(batch["tokens"].shape == (2, LENGTH) for batch in batches)
    assert all(array.dtype == np.int32 for batch in batches for array in batch.values())


def test_a_limit_takes_rows_at_even_distances():
    heldout = Heldout({"web": rows(*([i] for i in range(10)))}, {}, 3, batch_rows=3)
    (batch,) = heldout.batches()
    assert batch["targets"][:, 0].tolist() == [0, 3, 6]


def test_entropy_counts_real_training_targets_of_scored_sources():
    train = {"web": rows([7, 7], [8, 9]), "empty": rows([1])}
    heldout = Heldout({"web": rows([5]), "empty": rows()}, train, 9, batch_rows=2)
    share = (0.5, 0.25, 0.25)
    expected = -sum(p * math.log(p) for p in share)
    assert heldout.unigram_nats == {"web": pytest.approx(expected)}


def test_the_mean_is_over_targets_not_over_batches():
    sums = [
        {"source_nats": np.array([6.0, 0.0]), "source_targets": np.array([3, 0])},
        {"source_nats": np.array([4.0, 0.0]), "source_targets": np.array([1, 0])},
    ]
    assert mean_nats(("web", "empty"), sums) == {"web": 2.5}
