"""What surrounds a run goes away: its terminal, its folder, its disk."""

import os
import pty
import subprocess
import sys

import pytest

from glamcli.checkpoint import Checkpoints
from runs import assert_same_run

GLAM = [sys.executable, "-c", "from glamcli.cli.main import run; run()"]


@pytest.mark.slow
def test_a_closed_terminal_saves_and_ends_with_75(recipe, train, uninterrupted, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*GLAM, "train", str(recipe), "--run", str(tmp_path / "run")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        # The terminal is that of the process, which then hears when it is closed.
        preexec_fn=lambda: (os.setsid(), os.close(os.open(os.ttyname(0), os.O_RDWR))),
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
    )
    os.close(theirs)
    shown = b""
    while b"step 2" not in shown and b"loss" not in shown:
        shown += os.read(ours, 10_000)
    os.close(ours)
    assert process.wait(120) == 75, shown
    (saved, *_) = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert 0 < saved < 40
    run = train(tmp_path / "run")
    run.until("say", text=f"continuing from step {saved}")
    code, err = run.finish()
    assert code == 0, err
    assert_same_run(uninterrupted, tmp_path / "run")
