"""Nothing costs money unnoticed: whatever dies, in whatever order, `stop` leaves no slice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from glamcli.launch import ending
from glamcli.launch.record import Record
from runs import wait_until

QUICK = "ending.Patience(look=0.02, silence=2.0, apart=5.0, leaving=20.0, saving=20.0)"
START = f"from glamcli.launch import ending; ending.PATIENCE = {QUICK}"


@pytest.fixture
def launched(cloud, tmp_path, monkeypatch, launcher):
    """Starts a launch in a process of its own, whose command waits to be asked to save."""
    monkeypatch.setenv("FAKE_GLAM", str(Path(__file__).with_name("fake_glam.sh")))
    monkeypatch.setattr(ending, "PATIENCE", eval(QUICK))
    (cloud.folder / "ends").write_text("run run 3\n" * 9)
    words = ("launch", "test-tiny", "--tpu=v4-16", "--zone=z", f"--run={tmp_path / 'run'}")
    return partial(launcher, START, *words)


def wait_for(cloud, *words: str) -> None:
    wait_until(lambda: cloud.calls(*words))


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    ["queued-resources create", "tpu-vm scp", "worker.py install"],
)
def test_stop_after_the_launcher_was_killed_leaves_no_slice(launched, cloud, glam, moment):
    cloud.plan(slow=0.7)
    launcher = launched()
    wait_for(cloud, moment)
    launcher.kill()
    code, _, err = glam("launch", "stop", "glam-run")
    assert code == 0, err
    time.sleep(1.0)  # what a gcloud that outlived the launcher could still have created
    assert cloud.slices() == []
    assert "no slice is left" in err
    (line,) = glam("launch", "list", "--json")[1].splitlines()
    assert json.loads(line)["slice"] == "none"


def test_stop_saves_and_the_launcher_leaves_without_asking_for_another_slice(
    launched, cloud, glam, tmp_path
):
    launcher = launched()
    wait_for(cloud, "worker.py start")
    code, _, err = glam("launch", "stop", "glam-run")
    assert code == 0, err
    assert launcher.wait(timeout=30) == 0
    assert cloud.slices() == []
    assert len(cloud.calls("queued-resources create")) == 1
    assert (tmp_path / "run" / "checkpoints" / "99").is_dir()
    assert Record("glam-run").load().step == 99


@pytest.mark.slow
def test_a_launcher_leaves_when_another_machine_stops_its_launch(
    launched, cloud, glam, tmp_path, monkeypatch
):
    launcher = launched()
    wait_for(cloud, "worker.py start")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
        elsewhere.setattr(ending, "PATIENCE", dataclasses.replace(ending.PATIENCE, look=2.0))
        code, _, err = glam("launch", "stop", "glam-run", "--zone", "z")
    assert code == 0, err
    assert launcher.wait(timeout=30) == 0
    assert (cloud.slices(), len(cloud.calls("queued-resources create"))) == ([], 1)
    assert Record("glam-run").load().ended == "stopped from another machine"
    assert (tmp_path / "run" / "checkpoints" / "99").is_dir()


@pytest.mark.slow
def test_a_stop_from_another_machine_ends_a_launcher_that_waits_for_a_slice(
    launched, cloud, glam, tmp_path, monkeypatch
):
    cloud.plan(states=["WAITING_FOR_RESOURCES"] * 9999)
    launcher = launched()
    wait_for(cloud, "queued-resources describe")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
        code, _, err = glam("launch", "stop", "glam-run", "--zone", "z")
    assert code == 0, err
    assert launcher.wait(timeout=30) == 7
    assert cloud.slices() == []
    assert Record("glam-run").load().ended == "its slice was deleted by somebody else"
    assert len(cloud.calls("queued-resources create")) == 1


@pytest.mark.slow
def test_a_slice_that_is_deleted_in_the_console_is_not_rented_again(launched, cloud, glam):
    launcher = launched()
    wait_for(cloud, "worker.py start")
    (cloud.folder / "requests" / "glam-run.json").unlink()
    assert launcher.wait(timeout=30) == 7
    assert len(cloud.calls("queued-resources create")) == 1
    launch = Record("glam-run").load()
    assert (launch.ended, launch.gone) == ("its slice was deleted by somebody else", True)
    assert not launch.costs


@pytest.mark.slow
@pytest.mark.parametrize("then", ["login", "ctrl-c"])
def test_a_login_that_expires_at_the_end_is_waited_for_until_the_slice_is_deleted(
    launched, cloud, capfd, then
):
    expired = "Reauthentication failed. cannot prompt during non-interactive execution."
    (cloud.folder / "ends").write_text("0 0 20\n")
    cloud.plan(fail={"queued-resources delete": expired})
    launcher = launched()
    wait_until(lambda: len(cloud.calls("queued-resources delete")) > 2)
    assert (launcher.poll(), cloud.slices()) == (None, ["glam-run"])
    if then == "login":
        cloud.plan()
    else:
        launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == (0 if then == "login" else 130)
    said = " ".join(capfd.readouterr().err.split())
    assert "slice `glam-run` costs money until you log in: gcloud auth login" in said
    commands = "may still cost money: gcloud compute tpus queued-resources delete glam-run"
    assert (cloud.slices() == []) is (then == "login")
    assert (commands in said) is (then != "login")


@pytest.mark.slow
def test_a_command_that_outlives_its_supervisor_is_ended_by_the_next_start(launched, cloud):
    launcher = launched()
    homes = cloud.folder / "machines" / "glam-run"
    folders = [homes / worker / "glam-launch" / "glam-run" for worker in "01"]
    wait_until(lambda: all((each / "1-pid").exists() for each in folders))
    supervisor = int((folders[0] / "1-group").read_text())
    command = int((folders[0] / "1-pid").read_text())
    launcher.kill()
    launcher.wait()
    os.kill(supervisor, signal.SIGKILL)
    start = [sys.executable, folders[0] / "worker.py", "start", "2"]
    marked = {**os.environ, "FAKE_SLICE": str(cloud.folder / "glam-run")}  # ended with the cloud
    subprocess.run(start, check=True, env=marked)
    assert not Path(f"/proc/{command}/exe").exists()


@pytest.mark.slow
def test_a_launcher_that_was_killed_goes_on_with_what_runs(launched, cloud, glam, tmp_path):
    first = launched()
    wait_for(cloud, "worker.py start")
    first.kill()
    first.wait()
    before = len(cloud.calls("tpu-vm ssh"))
    second = launched()
    while len(cloud.calls("tpu-vm ssh")) < before + 3:
        time.sleep(0.05)
    assert second.poll() is None
    out = glam("launch", "status", "glam-run")[1]
    assert "worker 1: start 1 runs, newest step 3" in out
    assert len((cloud.folder / "starts-0").read_text().splitlines()) == 1
    words = ("launch", "test-tiny", "--tpu=v4-16", "--zone=z", "--spot")
    refused = glam(*words, f"--run={tmp_path / 'run'}")
    assert refused[0] == 7
    assert glam("launch", "stop", "glam-run")[0] == 0
    assert len(cloud.calls("queued-resources create")) == 1
    assert cloud.slices() == []


@pytest.mark.slow
def test_a_slice_that_google_does_not_delete_is_told_with_the_command_that_does(
    launched, cloud, glam
):
    launched()
    wait_for(cloud, "worker.py start")
    cloud.plan(fail={"queued-resources delete": "PERMISSION_DENIED: not you"})
    code, _, err = glam("launch", "stop", "glam-run")
    assert code == 7
    assert "slice `glam-run` may still cost money" in err
    assert "queued-resources delete glam-run --zone=z --project=p --force" in err
    cloud.plan()
    assert glam("launch", "stop", "glam-run")[0] == 0
    assert cloud.slices() == []
