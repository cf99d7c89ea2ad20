"""A save that dies, or whose disk fails, at one call of the file system loses that save at most.

The whole sweep over every call is `python benchmarks/reliability.py crash-points` and `io-errors`.
"""

import shutil

import pytest

import shim

pytestmark = pytest.mark.slow
# Calls of a save of about 115: the temporary folders, the arrays, the merged index, the markers,
# the rename that completes the step, the deletion of the oldest.
POINTS = (1, 4, 8, 13, 25, 40, 60, 70, 80, 88, 90, 91, 92, 95, 105)


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


def test_files_that_a_power_failure_left_empty_cost_no_more_than_their_step(
    built, folder, tmp_path
):
    struck = shim.save(built, folder)
    assert shim.usable(folder) == 3
    lost = [name[1:] for name in shim.unsynced(struck) if (folder / name[1:]).is_file()]
    assert "3/meta/metadata" in lost
    for names in (lost, *([name] for name in lost)):
        damaged = shutil.copytree(folder, tmp_path / "damaged")
        for name in names:
            (damaged / name).write_bytes(b"")
        assert shim.usable(damaged) in ((2,) if names == lost else (2, 3))
        shutil.rmtree(damaged)
