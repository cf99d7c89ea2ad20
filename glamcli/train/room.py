"""Whether the disk of a run can hold its checkpoints, asked before anything is compiled."""

import os

import jax

from glamcli.checkpoint import Checkpoints
from glamcli.config.sizes import bytes_text
from glamcli.errors import SaveFailed
from glamcli.step_folders import FEWEST_KEPT

COMPRESSED = 0.8
"""share of a state's bytes that its checkpoint takes at least: weights hardly compress."""
FILES = 100
"""the checkpoint of a small model has fewer, that of a large one may have more."""
_PROBE = ".probe"


def check_room(checkpoints: Checkpoints, state: object) -> str | None:
    """Asks the disk of checkpoints, whose folder may not be there yet, for room for the abstract
    `state`; a warning when it holds this checkpoint, and not as many as the run will keep.

    First deletes what a killed save left there, which nothing else would before the next save.

    Raises: SaveFailed when not one fits or nothing can be written there.
    """
    checkpoints.clean()
    if checkpoints.in_bucket is not None:  # a bucket has room
        return None
    folder, keep = checkpoints.folder, checkpoints.keep
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    there = folder if folder.is_dir() else folder.parent
    hint = f"make room there, or train elsewhere with `--run` (a checkpoint: {bytes_text(size)})"
    try:
        (there / _PROBE).write_bytes(b"\0" * 4096)
        (there / _PROBE).unlink()
        disk = os.statvfs(there)
    except OSError as error:
        reason = error.strerror or error
        raise SaveFailed(f"{there} cannot be written: {reason}", hint) from error
    free = disk.f_bavail * disk.f_frsize
    if disk.f_files and disk.f_favail < FILES:
        raise SaveFailed(f"the disk of {there} has {disk.f_favail} inodes left", hint)
    if not disk.f_blocks:  # a file system that does not say
        return None
    if free < COMPRESSED * size:
        raise SaveFailed(f"the disk of {there} has {bytes_text(free)} left", hint)
    # Before the oldest is deleted there is one more than are kept.
    more = max(max(keep, FEWEST_KEPT) + 1 - len(checkpoints.steps()), 1)
    if free < more * COMPRESSED * size:
        or_lower = f", or lower `checkpoints.keep` (now {keep})" if keep > FEWEST_KEPT else ""
        return (
            f"{more} more checkpoints of {bytes_text(size)} do not fit the disk of {there}, which"
            f" has {bytes_text(free)} left: make room{or_lower}"
        )
    return None
