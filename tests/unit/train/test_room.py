"""A disk without room for a checkpoint is told before anything is compiled."""

import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from glamcli.errors import CheckpointError
from glamcli.train.room import check_room

STATE = {"w": jax.ShapeDtypeStruct((1000, 1000), np.float32), "step": jax.ShapeDtypeStruct((), int)}


@pytest.fixture
def disk(monkeypatch):
    """Sets what the disk says of itself: megabytes and inodes that are left, blocks in all."""

    def set_disk(megabytes, inodes=10**6, blocks=10**6):
        said = SimpleNamespace(
            f_bavail=megabytes * 1000,
            f_frsize=1000,
            f_files=inodes and 10**7,
            f_favail=inodes,
            f_blocks=blocks,
        )
        monkeypatch.setattr(os, "statvfs", lambda path: said)

    return set_disk


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_disk_that_holds_no_checkpoint_is_refused_with_what_one_takes(
    tmp_path, disk, checkpoints
):
    folder = tmp_path / "checkpoints"
    if checkpoints:
        folder.mkdir()
    disk(3)
    with pytest.raises(CheckpointError, match=r"has 2\.86 MiB left") as caught:
        check_room(folder, 3, STATE)
    assert caught.value.hint.endswith("(a checkpoint: 3.81 MiB)")
    assert list(tmp_path.rglob(".probe")) == []


def test_a_disk_that_holds_fewer_than_are_kept_is_warned_of(tmp_path, disk):
    disk(10)
    warning = check_room(tmp_path, 3, STATE)
    assert warning is not None
    assert warning.startswith("4 more checkpoints of 3.81 MiB do not fit the disk of ")
    disk(17)
    assert check_room(tmp_path, 3, STATE) is None


def test_a_disk_without_inodes_is_refused_and_one_that_counts_none_is_not(tmp_path, disk):
    disk(1000, inodes=7)
    with pytest.raises(CheckpointError, match="has 7 inodes left"):
        check_room(tmp_path, 3, STATE)
    disk(1000, inodes=0)
    assert check_room(tmp_path, 3, STATE) is None


def test_a_disk_that_does_not_say_its_size_is_trusted(tmp_path, disk):
    disk(0, blocks=0)
    assert check_room(tmp_path, 3, STATE) is None


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "checkpoints" / ".probe").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be written: Is a directory"):
        check_room(tmp_path / "checkpoints", 3, STATE)
