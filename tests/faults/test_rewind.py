"""A run that was rewound is continued as if nothing else had happened, whatever interrupts it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glamcli.checkpoint import Checkpoints
from runs import STEPS, assert_same_run, metrics, weights


def rewind(folder: Path, to: int, *arguments: str) -> None:
    glam = [sys.executable, "-c", "from glamcli.cli.main import run; run()"]
    command = [*glam, "checkpoint", "rewind", str(folder), "--to", str(to), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_rewound_and_killed_it_equals_the_run_that_was_rewound_alone(
    train, uninterrupted, tmp_path
):
    before = weights(uninterrupted, STEPS)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        shutil.copytree(uninterrupted, folder)
        rewind(folder, 28, "--skip-batches", "4")
    for folder in (alone, killed):
        if folder == killed:
            for step in (33, 36):  # before and after its first save, at step 35
                run = train(folder)
                run.until_step(step)
                run.process.kill()
                run.finish()
        code, err = train(folder).finish()
        assert code == 0, err
        checkpoints = Checkpoints(folder / "checkpoints")
        assert checkpoints.steps() == [STEPS, 35, 28]
        assert checkpoints.meta(STEPS)["skipped_batches"] == [[28, 32]]
    assert_same_run(alone, killed)
    after = weights(alone, STEPS)
    assert after["step"] == before["step"] == STEPS
    assert after["opt_state/count"] == before["opt_state/count"] - 4
    kept = [line for line in metrics(uninterrupted) if line["step"] <= 28]
    assert metrics(alone)[: len(kept)] == kept
    assert metrics(alone)[len(kept)]["step"] == 33


@pytest.mark.slow
def test_rewound_without_leaving_anything_out_it_is_the_same_run_again(
    train, uninterrupted, tmp_path
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    rewind(tmp_path / "run", 28)
    code, err = train(tmp_path / "run").finish()
    assert code == 0, err
    assert [line for line in metrics(tmp_path / "run") if line.get("rewinds_total")]
    path = tmp_path / "run/metrics.jsonl"
    path.write_text(path.read_text().replace('"rewinds_total": 1', '"rewinds_total": 0'))
    assert_same_run(uninterrupted, tmp_path / "run")
