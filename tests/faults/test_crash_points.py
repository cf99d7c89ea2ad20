"""A save that dies, or whose disk fails, at one call of the file system loses that save at most.

The whole sweep over every call is `python benchmarks/reliability.py crash-points` and `io-errors`.
"""

import shutil

import pytest

import shim

pytestmark = pytest.mark.slow
# Calls of a save of about 140: the temporary folders, the arrays, the merged index, the markers,
# the syncs, the rename that completes the step (111), its sync, the deletion of the oldest.
POINTS = (1, 4, 8, 13, 25, 40, 60, 70, 84, 105, 110, 111, 112, 114, 125)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    found = shim.compiled(tmp_path_factory.mktemp("shim"))
    return found or pytest.skip("no C compiler")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "checkpoints"
    shim.first_steps(folder)
    return folder


@pytest.fixture
def folder(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


@pytest.mark.parametrize("at", POINTS)
def test_killed_at_a_call_the_newest_complete_step_is_exact_and_the_next_start_works(
    built, folder, at
):
    struck = shim.save(built, folder, at)
    assert struck.code == -9
    assert not shim.problems(folder, struck, at)


@pytest.mark.parametrize("at", POINTS[::2])
def test_an_error_of_the_disk_is_reported_and_the_second_try_saves(built, folder, at):
    struck = shim.save(built, folder, at, "fail", "EIO")
    assert struck.failures[-1] == ""
    assert all("Input/output error" in text for text in struck.failures[:-1])
    assert not shim.problems(folder, struck, at)


@pytest.mark.parametrize("at", POINTS[1::3])
def test_a_disk_that_stays_full_costs_no_older_step(built, folder, at):
    struck = shim.save(built, folder, at, "failfrom", "ENOSPC")
    assert struck.failures[-1] == "" or "No space left on device" in struck.failures[-1]
    assert not shim.problems(folder, struck, at)


def test_a_step_gets_its_name_when_its_files_are_on_the_disk_and_older_ones_go_after_that(
    built, folder
):
    """A power failure at any call leaves the steps that are complete without one. Orbax's own two
    markers, which it writes at last, may be lost: nothing depends on them."""
    struck = shim.save(built, folder)
    calls = [call[1:] for call in struck.calls]
    named = calls.index(["rename", "/3.orbax-checkpoint-tmp", "/3"])
    retired = calls.index(["rename", "/1", "/trash/1"])
    markers = {"/3/_CHECKPOINT_METADATA", "/3/commit_success.txt"}
    assert shim.unsynced(struck.calls[: named + 1]) == {"", "/3", *markers}
    assert "" not in shim.unsynced(struck.calls[: retired - 1])
    for name in markers:
        (folder / name[1:]).write_bytes(b"")
    assert shim.usable(folder) == 3
    (folder / "3/commit_success.txt").unlink()
    assert shim.usable(folder) == 3
