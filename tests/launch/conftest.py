"""The fake cloud on PATH, and launches in this process or in one of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


class Cloud:
    """The fake cloud: what it does, and what is left in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.plan()

    def plan(self, **does) -> None:
        (self.folder / "plan.json").write_text(json.dumps(does))

    def slices(self) -> list[str]:
        return [path.stem for path in (self.folder / "requests").glob("*.json")]

    def rent(self, name: str, label: str) -> None:
        """A slice that is ready, without a launch."""
        request = {"state": "ACTIVE", "labels": {"glam": label}, "todo": [], "port": 0}
        (self.folder / "requests").mkdir(exist_ok=True)
        (self.folder / "requests" / f"{name}.json").write_text(json.dumps(request))

    def calls(self, *words: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if all(word in line for word in words)]


@pytest.fixture
def launcher():
    """Starts `glam` in a process of its own, that ends with the test."""
    started = []

    def start(first: str, *words: str) -> subprocess.Popen:
        """`first` is Python to run before the command."""
        code = f"{first}; from glamcli.cli.main import run; run()"
        started.append(subprocess.Popen([sys.executable, "-c", code, *words]))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    folder = tmp_path / "cloud"
    for each in ("bin", "worker-bin"):
        (folder / each).mkdir(parents=True)
    for place, name, script in (
        ("bin", "gcloud", "fake_gcloud.py"),
        ("worker-bin", "uv", "fake_uv.py"),
    ):
        program = folder / place / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {HERE / script} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("FAKE_CLOUD", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    cloud = Cloud(folder)
    yield cloud
    for name in [*cloud.slices(), *(path.name for path in folder.glob("machines/*"))]:
        delete = "import sys, fake_gcloud; fake_gcloud.turn_off(sys.argv[1])"
        subprocess.run([sys.executable, "-c", delete, name], cwd=HERE, check=True)
