"""Batches of a run, read ahead of the device: the only module that imports grain.

A batch is random access (schedule -> rows -> one array per field), so grain only has to run it
in threads, in order, a few batches ahead. There is no iterator state: starting at step N is
reading batch N. What row k is, is decided in `mixture.py`; what a row holds, in `rows.py`.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np

from glamcli import faults
from glamcli.data.mixture import Schedule
from glamcli.data.rows import TOKEN_FIELDS, Row, Rows
from glamcli.errors import DamagedRecord, GlamError

HostBatch = dict[str, np.ndarray]

# Two threads hide the latency of one read behind another; more would fight over the interpreter
# lock with the training loop.
READ_THREADS = 2
BATCHES_AHEAD = 4
VERIFY_HINT = "run `glam data verify` on this recipe"


@dataclass(frozen=True)
class BatchReader(Sequence[HostBatch]):
    """The batches of steps start_step.. (without end, or `steps` of them), by random access.

    A process of several reads only the rows that its devices hold: `here` says which rows of
    every batch those are (by default all). They are the same rows, at the same indices, as if one
    process read the batch alone.
    """

    schedule: Schedule
    rows: Mapping[str, Sequence[Row] | Rows]
    """by source: random access to dicts of int32 arrays of one length."""
    batch_rows: int
    vocab_size: int
    start_step: int = 0
    steps: int | None = None
    here: Sequence[range] | None = None
    read_seconds: dict[str, float] = field(default_factory=dict)
    """by source, what its rows took so far."""

    def __len__(self) -> int:
        if self.steps is None:
            return sys.maxsize // self.batch_rows - self.start_step
        return self.steps

    def __getitem__(self, index: Any) -> HostBatch:
        """This process's rows of step start_step + index.

        Shapes: tokens, targets, segments [rows here, row_tokens]; source [rows here],
            an index into `schedule.names`; all int32.
        Raises: DamagedRecord, naming source and row, for a row that cannot be read or holds ids
            outside the vocabulary.
        """
        first = (self.start_step + index) * self.batch_rows
        blocks = [
            self.schedule.locate_range(first + block.start, first + block.stop)
            for block in self.here or [range(self.batch_rows)]
        ]
        source_B = np.concatenate([block.source for block in blocks])
        sources = source_B.tolist()
        at_rows = [row for block in blocks for row in block.row.tolist()]
        step = self.start_step + index + 1
        read = [self._read(step, *where) for where in zip(sources, at_rows, strict=True)]
        batch: HostBatch = {
            name: np.stack([row[name] for row in read]).astype(np.int32, copy=False)
            for name in TOKEN_FIELDS
        }
        for name in ("tokens", "targets"):
            # As unsigned numbers, negative ids are too large as well.
            outside_BS = batch[name].view(np.uint32) >= self.vocab_size
            if outside_BS.any():
                b, s = np.argwhere(outside_BS)[0]
                raise DamagedRecord(
                    f"row {at_rows[b]} of source `{self.schedule.names[sources[b]]}`: token id "
                    f"{batch[name][b, s]} is outside the vocabulary of {self.vocab_size}",
                    VERIFY_HINT,
                    step,
                )
        batch["source"] = source_B
        return batch

    def _read(self, step: int, source: int, row: int) -> Mapping[str, np.ndarray]:
        name = self.schedule.names[source]
        began = time.monotonic()
        try:
            faults.read_row(step)
            return self.rows[name][row]
        except GlamError as error:
            raise DamagedRecord(
                f"row {row} of source `{name}`: {error.what}", error.hint, step
            ) from error
        except Exception as error:
            raise DamagedRecord(
                f"row {row} of source `{name}` cannot be read: {error}",
                VERIFY_HINT,
                step,
            ) from error
        finally:
            spent = time.monotonic() - began
            self.read_seconds[name] = self.read_seconds.get(name, 0.0) + spent


@contextmanager
def read_ahead(reader: BatchReader) -> Iterator[Iterator[HostBatch]]:
    """The batches of a reader, read ahead in threads; at the end of the block, a batch that is
    being read is finished and dropped."""
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    batches: Any = iter(grain.MapDataset.source(reader).to_iter_dataset(options))
    with closing(batches):
        # Reading starts now, so that it overlaps compilation.
        batches.start_prefetch()
        yield batches
