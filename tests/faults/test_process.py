"""What surrounds a run goes away: its terminal, its folder, its disk."""

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from glamcli.checkpoint import Checkpoints
from runs import STEPS, assert_continues, assert_same_run, is_stopped, weights

GLAM = [sys.executable, "-c", "from glamcli.cli.main import run; run()"]


@pytest.mark.slow
def test_a_closed_terminal_saves_and_ends_with_75(recipe, train, uninterrupted, tmp_path):
    ours, theirs = pty.openpty()
    # The leader of a session that opens a terminal owns it, and hears when it is closed.
    own = "import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
    in_terminal = [*GLAM[:-1], own + GLAM[-1]]
    process = subprocess.Popen(
        [*in_terminal, "train", str(recipe), "--run", str(tmp_path / "run"), "--allow-faults"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "GLAM_FAULT": "stop@10",  # closing a terminal continues what is stopped
        },
    )
    os.close(theirs)
    shown = b""
    while not is_stopped(process.pid):
        assert process.poll() is None, shown
        if select.select([ours], [], [], 0.05)[0]:
            shown += os.read(ours, 10_000)
    os.close(ours)
    assert process.wait(120) == 75, shown
    (saved, *_) = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert 0 < saved < 40
    assert_continues(train(tmp_path / "run"), saved, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("during", ["training", "saving"])
def test_a_run_whose_folder_is_deleted_ends_within_seconds_with_clear_words(
    train, tmp_path, during
):
    run = train(tmp_path / "run", "--set", "train.steps=100000")
    if during == "training":
        run.until_step(3)
    else:
        run.until("say", text="step 7: saved")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    last = max((each["step"] for each in run.events() if each["event"] == "step"), default=0)
    code, err = run.finish()
    assert code == 4
    assert f"the run folder {tmp_path / 'run'} is gone" in err
    assert "Traceback" not in err
    assert last < 10_000


def mount(folder, size):
    """A disk of its own; skips where this may not be done."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing(train, uninterrupted, tmp_path):
    disk = tmp_path / "disk"
    mount(disk, "8m")
    try:
        run = train(disk / "run")
        run.until_step(3)
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        for event in run.events():
            if event["event"] == "warn" and "No space left on device" in event["text"]:
                warning = event["text"]
                if warning.startswith("saving step 7 failed"):
                    break
        ballast.unlink()
        code, err = run.finish()
        assert code == 0, err
        assert "trying again in 5.0 s" in warning
        before, after = weights(uninterrupted, STEPS), weights(disk / "run", STEPS)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert not [name for name in before if before[name].tobytes() != after[name].tobytes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [("16k", "No space left on device"), ("1m,ro", "Read-only file system")],
)
def test_a_cache_without_room_or_that_is_read_only_is_refused_before_anything_is_compiled(
    train, tmp_path, options, reason
):
    disk = tmp_path / "disk"
    mount(disk, options)
    try:
        run = train(tmp_path / "run", "--set", f"data.cache_dir={disk}/cache")
        code, err = run.finish()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert code == 3
    error, hint = err.splitlines()
    assert re.match(f"error: .*{disk}/cache.* cannot be written: .*{reason}$", error)
    assert "`data.cache_dir`" in hint
    assert "compiling" not in run.rest


@pytest.mark.slow
def test_a_damaged_cache_of_compiled_programs_is_compiled_again(
    recipe, train, uninterrupted, tmp_path
):
    for damage in (None, "bits", "empty"):
        run = train(tmp_path / f"run {damage}")
        code, err = run.finish()
        assert code == 0, err
        assert_same_run(uninterrupted, tmp_path / f"run {damage}")
        programs = list((recipe.parent / "cache/compiled").iterdir())
        assert programs
        for path in programs:
            content = bytearray(path.read_bytes())
            for place in range(0, len(content), 97):
                content[place] ^= 0xFF
            path.write_bytes(content if damage is None else b"")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with spaces & $(signs) 'quoted'", "日本語 ñ ✓", "x" * 200])
def test_any_name_of_a_run_works(train, tmp_path, name):
    run = train(tmp_path / name, "--set", "train.steps=7")
    assert run.finish()[0] == 0
    saved = subprocess.run(
        [*GLAM, "generate", str(tmp_path / name), "1 and 2", "--tokens", "3"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert saved.returncode == 0, saved.stderr
    assert saved.stdout.startswith("1 and 2")


# A save that takes half a minute longer, so that there is time to be killed in it.
SLOW_SAVES = """
import time
from glamcli.checkpoint import Checkpoints
wait = Checkpoints.wait
def slow(checkpoints):
    if checkpoints._saving is not None and checkpoints._saving % 7:
        time.sleep(30)
    return wait(checkpoints)
Checkpoints.wait = slow
"""


@pytest.mark.slow
def test_a_run_killed_shortly_after_it_was_asked_to_stop_goes_on_from_a_whole_step(
    train, uninterrupted, tmp_path
):
    run = train(tmp_path / "run", first=SLOW_SAVES)
    run.until("say", text="step 7: saved")
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    run.process.kill()
    run.finish()
    steps = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert 7 in steps
    assert_continues(train(tmp_path / "run"), steps[0], uninterrupted)
