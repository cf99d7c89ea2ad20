"""Input speed on one core: rows and tokens per second that training would receive.

    python benchmarks/input.py [--rows 8] [--row-tokens 256] [--seconds 3]

Bytes rows, GLaM's six weights. `memory` reads rows from lists (what the schedule, assembling and
grain cost); `array_record` reads prepared shards from disk, warm; `schedule` only locates rows.
The process is pinned to one core, so read-ahead threads and the reader share it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from glamcli.data.mixture import Schedule
from glamcli.data.rows import Rows, write_rows_meta, write_shard
from glamcli.data.stream import BatchReader, read_ahead

WEIGHTS = {
    "webpages": 0.42,
    "wikipedia": 0.06,
    "conversations": 0.28,
    "forums": 0.02,
    "books": 0.20,
    "news": 0.02,
}
ROWS_PER_SOURCE = 4000
VOCAB_SIZE = 259


def made_row(row_tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A row of text-like bytes."""
    ids = (rng.zipf(1.3, row_tokens + 1) % 100 + 3).astype(np.int32)
    return {"tokens": ids[:-1], "targets": ids[1:], "segments": np.ones(row_tokens, np.int32)}


def on_disk(rows: list[dict[str, np.ndarray]], row_tokens: int, folder: Path) -> Rows:
    """The same rows as a prepared dataset."""
    folder.mkdir()
    arrays = ((row["tokens"], row["targets"], row["segments"]) for row in rows)
    shard = asdict(
        write_shard(folder / "rows-train.array_record-00000-of-00001", row_tokens, arrays)
    )
    counts = {
        "num_rows": len(rows),
        "num_documents": 1,
        "num_tokens": len(rows) * row_tokens,
        "max_id": VOCAB_SIZE - 1,
    }
    split = {"shards": [shard], "counts": counts}
    write_rows_meta(folder, {"row_tokens": row_tokens, "splits": {"train": split}})
    return Rows(folder, "train")


def rate(run: Callable[[int], object], seconds: float) -> float:
    """Calls per second of `run(i)` after a warm-up."""
    for i in range(20):
        run(i)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        run(20 + done)
        done += 1
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    rng = np.random.default_rng(0)
    memory = {
        name: [made_row(args.row_tokens, rng) for _ in range(ROWS_PER_SOURCE)] for name in WEIGHTS
    }
    schedule = Schedule(0, [(0, WEIGHTS)], dict.fromkeys(WEIGHTS, ROWS_PER_SOURCE))

    def show(name: str, batches_per_second: float) -> None:
        rows = batches_per_second * args.rows
        print(f"{name:14}{rows:12,.0f} rows/s{rows * args.row_tokens:14,.0f} tokens/s", flush=True)

    print(f"batches of {args.rows} rows x {args.row_tokens} tokens, one core")
    show("schedule", rate(lambda i: schedule.locate_range(i * args.rows, (i + 1) * args.rows), 1))
    with tempfile.TemporaryDirectory() as folder:
        disk = {
            name: on_disk(rows, args.row_tokens, Path(folder) / name)
            for name, rows in memory.items()
        }
        inputs: dict[str, Mapping[str, Any]] = {"memory": memory, "array_record": disk}
        for name, rows in inputs.items():
            with read_ahead(BatchReader(schedule, rows, args.rows, VOCAB_SIZE)) as stream:
                show(name, rate(lambda _, stream=stream: next(stream), args.seconds))


if __name__ == "__main__":
    main()
