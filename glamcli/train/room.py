"""Whether the disk of a run can hold its checkpoints, asked before anything is compiled."""

import os
from pathlib import Path

import jax

from glamcli.config.sizes import bytes_text
from glamcli.errors import CheckpointError
from glamcli.step_folders import complete_steps

COMPRESSED = 0.8
"""share of a state's bytes that its checkpoint takes at least: weights hardly compress."""
FILES = 100
"""more than a checkpoint has."""
_PROBE = ".probe"


def check_room(folder: Path, keep: int, state: object) -> str | None:
    """Asks the disk of a checkpoints folder, which may not be there yet, for room for the abstract
    `state`; a warning when it holds this checkpoint, and not as many as the run will keep.

    Raises: CheckpointError when not one fits or nothing can be written there.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    there = folder if folder.is_dir() else folder.parent
    hint = f"make room there, or train elsewhere with `--run` (a checkpoint: {bytes_text(size)})"
    try:
        (there / _PROBE).write_bytes(b"\0" * 4096)
        (there / _PROBE).unlink()
        disk = os.statvfs(there)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{there} cannot be written: {reason}", hint) from error
    free = disk.f_bavail * disk.f_frsize
    if disk.f_files and disk.f_favail < FILES:
        raise CheckpointError(f"the disk of {there} has {disk.f_favail} inodes left", hint)
    if not disk.f_blocks:  # a file system that does not say
        return None
    if free < COMPRESSED * size:
        raise CheckpointError(f"the disk of {there} has {bytes_text(free)} left", hint)
    # Before the oldest is deleted there is one more than are kept.
    more = max(keep + 1 - len(complete_steps(folder)), 1)
    if free < more * COMPRESSED * size:
        return (
            f"{more} more checkpoints of {bytes_text(size)} do not fit the disk of {there}, which"
            f" has {bytes_text(free)} left: make room, or lower `checkpoints.keep` (now {keep})"
        )
    return None
