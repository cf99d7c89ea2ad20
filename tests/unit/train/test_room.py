"""A disk without room for a checkpoint is told before anything is compiled."""

import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.errors import SaveFailed
from glamcli.hosts.join import Host
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
    with pytest.raises(SaveFailed, match=r"has 2\.86 MiB left") as caught:
        check_room(Checkpoints(folder), STATE)
    assert caught.value.hint.endswith("(a checkpoint: 3.81 MiB)")
    assert list(tmp_path.rglob(".probe")) == []


def test_a_disk_that_holds_fewer_than_are_kept_is_warned_of(tmp_path, disk):
    disk(10)
    warning = check_room(Checkpoints(tmp_path), STATE)
    assert warning is not None
    assert warning.startswith("4 more checkpoints of 3.81 MiB do not fit the disk of ")
    assert warning.endswith("make room, or lower `checkpoints.keep` (now 3)")
    disk(17)
    assert check_room(Checkpoints(tmp_path), STATE) is None


def test_two_are_kept_whatever_the_recipe_says_and_not_advised_against(tmp_path, disk):
    disk(8)
    warning = check_room(Checkpoints(tmp_path, keep=1), STATE)
    assert warning is not None
    assert warning.startswith("3 more checkpoints ")
    assert warning.endswith("left: make room")


@pytest.mark.parametrize("left", ["9.orbax-checkpoint-tmp", "trash"])
def test_what_a_killed_save_left_takes_no_room(tmp_path, monkeypatch, disk, left):
    (tmp_path / left / "state").mkdir(parents=True)
    disk(17)
    emptied = os.statvfs(tmp_path)
    disk(3)
    full = os.statvfs(tmp_path)
    is_there = (tmp_path / left).exists
    monkeypatch.setattr(os, "statvfs", lambda path: full if is_there() else emptied)
    with pytest.raises(SaveFailed):  # the first process alone writes there
        check_room(Checkpoints(tmp_path, host=Host(1, 2)), STATE)
    assert check_room(Checkpoints(tmp_path), STATE) is None


def test_a_disk_without_inodes_is_refused_and_one_that_counts_none_is_not(tmp_path, disk):
    disk(1000, inodes=7)
    with pytest.raises(SaveFailed, match="has 7 inodes left"):
        check_room(Checkpoints(tmp_path), STATE)
    disk(1000, inodes=0)
    assert check_room(Checkpoints(tmp_path), STATE) is None


def test_a_disk_that_does_not_say_its_size_is_trusted(tmp_path, disk):
    disk(0, blocks=0)
    assert check_room(Checkpoints(tmp_path), STATE) is None


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "checkpoints" / ".probe").mkdir(parents=True)
    with pytest.raises(SaveFailed, match=r"checkpoints cannot be written: Is a directory"):
        check_room(Checkpoints(tmp_path / "checkpoints"), STATE)
