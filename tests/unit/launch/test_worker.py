"""What runs on the machines of a slice: on any of their Pythons, and what it says in trouble."""

import ast
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from glamcli.launch import worker
from glamcli.launch.control import Control
from glamcli.launch.ending import Patience
from glamcli.launch.record import Launch, Record
from glamcli.launch.workers import Told


def test_it_is_python_3_8_with_the_standard_library_only():
    tree = ast.parse(Path(worker.__file__).read_text(), feature_version=(3, 8))
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported | froms if name.startswith("glamcli")]
    modern = {"removeprefix", "removesuffix", "bit_count", "pairwise"}  # of strings and later
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not modern & used


def test_a_full_disk_is_named_before_anything_is_installed(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3.1e9))
    with pytest.raises(SystemExit, match=r"only 3\.1 GB are free on the disk, 8 are needed"):
        worker._install_package({"setup": "exit 1"})


def test_what_a_dead_process_left_keeps_no_start_from_the_tpu(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "HERE", tmp_path)
    monkeypatch.setattr(worker, "STOPPED", tmp_path / "stopped")
    monkeypatch.setattr(worker, "LIBTPU_LOCK", tmp_path / "libtpu_lockfile")
    monkeypatch.setattr(worker.subprocess, "Popen", lambda *_, **__: SimpleNamespace(pid=1))
    (tmp_path / "libtpu_lockfile").touch()
    worker._start(1)
    assert (tmp_path / "attempt.1").exists()
    assert not (tmp_path / "libtpu_lockfile").exists()


def test_clocks_that_are_apart_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    said = []
    progress = SimpleNamespace(warn=said.append, say=said.append)
    launch = Launch("glam-run", "v4-16", "z", "p", attempt=1)
    control = Control(launch, Record("glam-run"), None, progress, said.append, Patience())
    workers = SimpleNamespace(start=lambda *_: ("no worker", "all took it"))
    told = {n: Told("d", 0, None, 0, clock, 0, 0, "") for n, clock in enumerate((1e9, 1e9 + 75))}
    control._start(workers, told)
    assert said[0] == "the clocks of the workers are 1:15 apart"
