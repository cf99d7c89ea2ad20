"""Launches of runs in a bucket: what is kept there, and that any machine can end one for good."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from glamcli.launch import ending
from glamcli.launch.gcloud import Gcloud
from glamcli.launch.in_bucket import LaunchFolder
from glamcli.launch.record import Record
from glamcli.storage import place
from runs import WALL_CLOCK, finished, free_port, wait_until

HERE = Path(__file__).parent
QUICK = "ending.Patience(look=0.1, silence=2.0, apart=5.0, leaving=20.0, saving=20.0, creating=3.0)"
START = f"from glamcli.launch import ending; ending.PATIENCE = {QUICK}"
HASTY = """#!/bin/sh
exec {python} -c "
from glamcli.hosts import lease
lease.RENEW_SECONDS, lease.STALE_SECONDS = 0.5, 5.0
from glamcli.cli.main import run; run()" "$@"
"""


@pytest.fixture
def words(cloud, bucket, monkeypatch):
    """A launch of one worker into a bucket, whose command ends as scripted."""
    monkeypatch.setenv("FAKE_GLAM", str(HERE / "fake_glam.sh"))
    monkeypatch.setattr(ending, "PATIENCE", eval(QUICK))
    cloud.plan(workers=1, states=[])
    (cloud.folder / "ends").write_text("0 0\n" * 9)
    return ("launch", "test-tiny", "--tpu=v4-8", "--zone=z", "--run", f"{bucket}/run")


@pytest.fixture
def launched(words, launcher):
    """Starts the launch in a process of its own."""
    return partial(launcher, START, *words)


def test_what_the_workers_install_is_fetched_from_the_bucket_and_their_logs_are_there(
    words, cloud, bucket, glam, tmp_path, monkeypatch
):
    code, out, err = glam(*words)
    assert code == 0, err
    assert "worker 0 trains to step" in out
    folder = Record("glam-run").folder / "package"
    assert sorted(path.name for path in folder.iterdir()) == ["package.json", "worker.py"]
    facts = json.loads((folder / "package.json").read_text())
    there = place(f"{bucket}/run/launch")
    kept = {name: (there / name).read(1 << 30) for name in there.files()}
    assert {f"package/{name}" for name in facts["fetch"]} < set(kept)
    assert not [name for name in kept if facts["secret"].encode() in kept[name]]
    assert kept["logs/worker-0-start-1.log"] == b"worker 0 trains to step \n"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    assert glam("launch", "logs", f"{bucket}/run")[1] == "worker 0 trains to step \n"
    assert f"glam-run: done; run {bucket}/run" in glam("launch", "status", f"{bucket}/run")[1]


@pytest.mark.slow
def test_a_package_that_was_exchanged_in_the_bucket_is_not_installed(
    words, cloud, glam, monkeypatch
):
    send = LaunchFolder.send

    def exchanged(self, package):
        send(self, package)
        (self.url / "package" / "recipe.yaml").write(b"extends: quickstart\n")

    monkeypatch.setattr(LaunchFolder, "send", exchanged)
    code, _, err = glam(*words)
    assert (code, cloud.slices()) == (7, [])
    assert "recipe.yaml in the bucket is not the one that was sent" in err


REFUSED = {
    "a bucket of Google's, gs://": {"--run": "s3://bucket/run"},
    "gcloud storage buckets create gs://no-such-bucket --location": {
        "--run": "gs://no-such-bucket/r"
    },
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_trained_in_a_bucket_is_refused_before_anything_is_asked_for(
    words, cloud, glam, said
):
    options = [word for option in REFUSED[said].items() for word in option]
    code, _, err = glam(*words, *options)
    assert (code in (2, 7), said in err) == (True, True), err
    assert not cloud.calls("queued-resources create")
    code, _, err = glam("launch", "stop", "s3://bucket/run")
    assert (code, "a bucket of Google's, gs://" in err) == (2, True)


def test_a_bucket_in_another_region_is_warned_of_with_the_price(words, cloud, glam):
    cloud.plan(workers=1, states=[], location="EUROPE-WEST4")
    code, _, err = glam(*words[:3], "--zone=us-central2-b", *words[4:], "--dry-run")
    assert code == 0, err
    assert "is in EUROPE-WEST4, and the slice in us-central2" in err
    assert "costs about 0.05 dollars per GB" in err


@pytest.mark.slow
def test_a_stop_elsewhere_ends_a_launcher_whose_requests_are_refused(
    launched, cloud, bucket, glam, tmp_path, monkeypatch
):
    cloud.plan(create=["RESOURCE_EXHAUSTED: Quota limit 'V4' has been exceeded."] * 999)
    launcher = launched()
    wait_until(lambda: len(cloud.calls("queued-resources create")) > 1)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
        code, _, err = glam("launch", "stop", f"{bucket}/run")
    assert code == 0, err
    tried = len(cloud.calls("queued-resources create"))
    cloud.plan(workers=1, states=[])
    assert launcher.wait(timeout=60) == 0
    assert (cloud.slices(), len(cloud.calls("queued-resources create"))) == ([], tried)
    assert Record("glam-run").load().ended == "stopped from another machine"


def test_a_slice_that_came_after_the_word_to_end_is_deleted_by_its_launcher(
    words, cloud, glam, monkeypatch
):
    create = Gcloud.create

    def created(self, launch, held):
        LaunchFolder(launch.run).stop(launch)  # while this process slept, after it had looked
        create(self, launch, held)

    monkeypatch.setattr(Gcloud, "create", created)
    code, _, err = glam(*words)
    assert (code, "was stopped from another machine" in err) == (0, True), err
    assert cloud.calls("queued-resources delete glam-run")


@pytest.mark.parametrize("key", ["name", "zone"])
def test_a_hostile_record_in_the_bucket_is_no_path_and_no_option(words, cloud, bucket, glam, key):
    launch = {"name": "a", "target": "v4-8", "zone": "z", "project": "p", key: "../--x"}
    place(f"{bucket}/run/launch/launch.json").write(json.dumps(launch).encode())
    for command in ("status", "logs", "stop"):
        code, _, err = glam("launch", command, f"{bucket}/run")
        assert (code, f"{bucket}/run/launch/launch.json: " in err) == (7, True), err
    assert not cloud.calls()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_stop_elsewhere_in_the_middle_of_a_request_leaves_no_slice(
    launched, cloud, bucket, glam, tmp_path, monkeypatch, killed
):
    cloud.plan(workers=1, slow=1.5)
    launcher = launched()
    wait_until(lambda: cloud.calls("queued-resources create"))
    if killed:
        launcher.kill()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
        code, _, err = glam("launch", "stop", f"{bucket}/run")
    assert "waiting: a launcher elsewhere is creating the slice" in err
    assert (code, "which may still come" in err) == ((7, True) if killed else (0, False)), err
    if not killed:
        assert launcher.wait(timeout=60) == 0
    assert (cloud.slices(), len(cloud.calls("queued-resources create"))) == ([], 1)


@pytest.mark.slow
def test_no_slice_is_asked_for_while_the_bucket_does_not_say_whether_it_is_wanted(
    launched, cloud, weather, monkeypatch
):
    launcher = launched()
    weather.fault = lambda method, path: 403 if "stopped" in path else None
    wait_until(lambda: any("stopped" in path for _, path in weather.requests))
    time.sleep(1.0)
    assert (launcher.poll(), cloud.calls("queued-resources create")) == (None, [])
    weather.fault = lambda method, path: None
    assert launcher.wait(timeout=60) == 0
    assert cloud.slices() == []


@pytest.mark.slow
def test_a_run_whose_slice_is_taken_away_twice_ends_bit_for_bit_as_undisturbed(
    cloud, bucket, recipe, train, tmp_path, monkeypatch, glam
):
    address, short = f"127.0.0.1:{free_port()}", ("--set", "train.steps=24")
    place_of = ("--coordinator", address, "--num-processes", "2", "--process-id")
    finished([train(tmp_path / "undisturbed", *short, *place_of, number) for number in "01"])
    hasty = tmp_path / "glam"
    hasty.write_text(HASTY.format(python=sys.executable))
    hasty.chmod(0o755)
    monkeypatch.setenv("FAKE_GLAM", str(hasty))
    monkeypatch.setattr(ending, "PATIENCE", ending.Patience(look=0.2))
    devices = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    monkeypatch.setenv("XLA_FLAGS", devices)
    run = f"{bucket}/run"
    cloud.plan(preempt=[7, 14], run=run)
    code, out, err = glam("launch", recipe, *short, "--tpu=v4-16", "--zone=z", "--run", run)
    assert code == 0, (out, err)
    assert err.count("the slice is lost") == 2
    assert "continuing from step" in out
    alone = tmp_path / "undisturbed"
    steps = json.loads(place(f"{run}/steps.json").read(1 << 30))
    description = (alone / "checkpoints" / "24" / "meta" / "metadata").read_text()
    digests = json.loads(steps["24/meta/metadata"])["digests"]
    assert digests == json.loads(description)["digests"]
    assert metrics(place(f"{run}/metrics.jsonl").read(1 << 30)) == metrics(
        (alone / "metrics.jsonl").read_bytes()
    )
    assert cloud.slices() == []


def metrics(data: bytes) -> list[dict]:
    lines = [json.loads(line) for line in data.splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]
