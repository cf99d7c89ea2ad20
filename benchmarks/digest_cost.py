"""What the digests of a checkpoint cost: a digest's seconds as a share of a save and of a restore.

    python benchmarks/digest_cost.py [--megabytes 210] [--turns 15]

Saves and restores five float32 arrays in a folder of its own (`TMPDIR` chooses the disk) and prints
medians. A save lasts until its step is complete. The first digest is printed by itself: it compiles
a program per shape.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from glamcli.checkpoint import Checkpoints
from glamcli.model.digest import digests


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=210)
    parser.add_argument("--turns", type=int, default=15)
    asked = parser.parse_args()
    shape = (asked.megabytes * 50, 1000)
    state = {f"w{k}": jax.random.normal(jax.random.key(k), shape) for k in range(5)}
    kinds: dict[str, list[float]] = {"digest": [], "save": [], "restore": []}
    print(f"first digest, with its compilation: {seconds(lambda: digests(state)):.3f} s")
    with tempfile.TemporaryDirectory(prefix="glam-digest-") as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", 2)

        def save() -> None:
            checkpoints.save(step, state, {"recipe": {}})
            checkpoints.wait()

        for step in range(1, asked.turns + 1):
            kinds["digest"].append(seconds(lambda: digests(state)))
            kinds["save"].append(seconds(save))
            kinds["restore"].append(seconds(lambda: checkpoints.restore(step, state)))  # noqa: B023
        checkpoints.close()
    medians = {kind: statistics.median(taken) for kind, taken in kinds.items()}
    digest = medians.pop("digest")
    for kind, whole in medians.items():
        print(f"{kind}: {whole:.3f} s, of which digests {digest:.3f} s ({digest / whole:.1%})")


if __name__ == "__main__":
    main()
