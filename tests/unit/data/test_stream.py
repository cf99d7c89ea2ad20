import threading
import time
from itertools import islice

import numpy as np
import pytest

from glamcli.data.mixture import Schedule
from glamcli.data.rows import TOKEN_FIELDS
from glamcli.data.stream import BatchReader, read_ahead
from glamcli.errors import DataError

LENGTH = 6
SIZES = {"web": 11, "books": 7}
SCHEDULE = Schedule(3, [(0, {"web": 0.7, "books": 0.3}), (40, {"books": 1})], SIZES)


def made_rows(name):
    """Rows whose tokens say which row they are."""
    offset = 1000 * list(SIZES).index(name)
    return [
        {
            field: np.full(LENGTH, offset + 10 * i + j, np.int32)
            for j, field in enumerate(TOKEN_FIELDS)
        }
        for i in range(SIZES[name])
    ]


ROWS = {name: made_rows(name) for name in SIZES}


def read(start, steps, here=None, rows=ROWS, batch_rows=8):
    with read_ahead(BatchReader(SCHEDULE, rows, batch_rows, 5000, start, steps, here)) as stream:
        return list(stream)


def same(one, two):
    return all(np.array_equal(one[field], two[field]) for field in (*TOKEN_FIELDS, "source"))


def test_batches_hold_the_rows_of_the_schedule_in_order():
    got = read(0, 9)
    assert len(got) == 9
    for k in range(72):
        batch, i = got[k // 8], k % 8
        place = SCHEDULE.locate(k)
        assert SCHEDULE.names[batch["source"][i]] == place.source
        for field in TOKEN_FIELDS:
            assert np.array_equal(batch[field][i], ROWS[place.source][place.row][field])
    assert got[0]["tokens"].shape == (8, LENGTH)
    assert {array.dtype for array in got[0].values()} == {np.dtype(np.int32)}


def test_starting_later_is_the_rest_of_starting_at_zero():
    whole = read(0, 9)
    for start in (1, 5, 8):
        rest = read(start, 9 - start)
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_a_far_step_costs_no_reading_of_earlier_ones():
    with read_ahead(BatchReader(SCHEDULE, ROWS, 8, 5000, 10**12)) as stream:
        batch = next(stream)
    assert batch["tokens"].shape == (8, LENGTH)


@pytest.mark.parametrize(
    "hosts",
    [
        [[range(4)], [range(4, 8)]],
        [[range(i, i + 1)] for i in range(8)],
        # Devices of one host need not lie side by side in the mesh.
        [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]],
    ],
    ids=["halves", "rows", "interleaved"],
)
def test_hosts_together_read_what_one_host_reads(hosts):
    whole = read(2, 4)
    parts = [read(2, 4, here) for here in hosts]
    for step, batch in enumerate(whole):
        joined = {field: np.empty_like(array) for field, array in batch.items()}
        for here, part in zip(hosts, parts, strict=True):
            numbers = [row for block in here for row in block]
            for field in batch:
                joined[field][numbers] = part[step][field]
        assert same(batch, joined)


class Damaged(list):
    def __init__(self, rows, at, error):
        super().__init__(rows)
        self.at, self.error = at, error

    def __getitem__(self, index):
        if index == self.at:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("chunk data hash mismatch"), "row 4 of source `books` cannot be read: chunk"),
        (DataError("shard 3: checksum differs", "prepare again"), "row 4 of source `books`: shard"),
    ],
)
def test_a_damaged_row_is_named_when_its_batch_is_due(error, said):
    rows = ROWS | {"books": Damaged(ROWS["books"], 4, error)}
    good = []
    reader = BatchReader(SCHEDULE, rows, 8, 5000)
    with read_ahead(reader) as stream, pytest.raises(DataError) as caught:
        good.extend(stream)
    assert said in caught.value.what
    first = next(k for k in range(100) if SCHEDULE.locate(k)[::2] == ("books", 4))
    assert len(good) == first // 8


@pytest.mark.parametrize("token", [5000, -1])
def test_an_id_outside_the_vocabulary_is_refused(token):
    bad = {field: array.copy() for field, array in ROWS["web"][2].items()}
    bad["targets"][3] = token
    rows = ROWS | {"web": [*ROWS["web"][:2], bad, *ROWS["web"][3:]]}
    with pytest.raises(DataError, match=f"row 2 of source `web`: token id {token} is outside"):
        read(0, 9, rows=rows)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if "grain-prefetch" in thread.name]


def test_closing_leaves_no_thread_behind():
    before = set(prefetch_threads())
    with read_ahead(BatchReader(SCHEDULE, ROWS, 8, 5000)) as stream:
        assert len(list(islice(stream, 3))) == 3
        assert set(prefetch_threads()) - before
    deadline = time.monotonic() + 5
    while set(prefetch_threads()) - before:
        assert time.monotonic() < deadline, "threads still run 5 s after close"
        time.sleep(0.01)


def test_reading_runs_ahead_of_the_reader():
    read_rows = []

    class Counted(list):
        def __getitem__(self, index):
            read_rows.append(index)
            return super().__getitem__(index)

    rows = {name: Counted(ROWS[name]) for name in ROWS}
    with read_ahead(BatchReader(SCHEDULE, rows, 8, 5000)):
        deadline = time.monotonic() + 5
        while len(read_rows) < 32:
            assert time.monotonic() < deadline, "nothing was read before it was asked for"
            time.sleep(0.01)
