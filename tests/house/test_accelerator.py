"""The script for a borrowed accelerator works, so that no minute there is lost to it."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_is_reported(tmp_path):
    report = tmp_path / "report.md"
    command = [sys.executable, SCRIPT, "--tiny", "--out", report]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = report.read_text().splitlines()
    assert sum(line.startswith("## ") for line in lines) == 5
    assert sum(" right |" in line for line in lines) == 12
    assert "failed" not in report.read_text()
