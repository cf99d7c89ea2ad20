"""`glam launch` against a cloud of folders: what it does at every end, and that nothing is left."""

import shutil
import subprocess
from pathlib import Path

import pytest

from glamcli.errors import CloudError
from glamcli.launch import ending
from glamcli.launch.gcloud import Gcloud
from glamcli.launch.record import Launch, Record

FAST = ending.Patience(look=0.02, silence=2.0, apart=5.0, leaving=20.0, saving=20.0)


@pytest.fixture
def scripted(cloud, tmp_path, monkeypatch):
    """A launch in this process whose command ends as scripted: (exit code, stdout, stderr)."""
    monkeypatch.setenv("FAKE_GLAM", str(Path(__file__).with_name("fake_glam.sh")))
    monkeypatch.setattr(ending, "PATIENCE", FAST)
    return Scripted(cloud, tmp_path / "run")


class Scripted:
    def __init__(self, cloud, run):
        self.cloud, self.run = cloud, run
        self.words = ("launch", "test-tiny", "--tpu", "v4-16", "--zone", "z", "--run", str(run))

    def ends(self, *lines: str) -> None:
        (self.cloud.folder / "ends").write_text("".join(f"{line}\n" for line in lines))

    def starts(self, worker: int = 0) -> int:
        return len((self.cloud.folder / f"starts-{worker}").read_text().splitlines())


def test_a_run_that_ends_gives_its_slice_back_and_says_what_it_cost(scripted, glam):
    scripted.ends("0 0 20")
    code, out, err = glam(*scripted.words, "--spot")
    assert code == 0, err
    assert out == "worker 0 trains to step 20\n"
    assert "glam-run: done; step 20, 0.0" in err
    assert " hours of v4-16, about 0." in err
    assert scripted.cloud.slices() == []
    assert glam("launch", "logs", "glam-run")[1] == out
    assert "glam-run: done" in glam("launch", "status", "glam-run")[1]
    created = scripted.cloud.calls("queued-resources create")
    assert "--accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base" in created[0]
    assert created[0].endswith("--spot --zone=z --project=p --quiet")


@pytest.mark.slow
def test_ends_that_may_pass_start_again_on_all_workers_and_final_ones_do_not(scripted, glam):
    scripted.ends("75 75 3", "134 86 5", "-6 134 7", "134 3 8")
    code, out, err = glam(*scripted.words)
    assert (code, scripted.starts(0), scripted.starts(1)) == (3, 4, 4), err
    assert "worker 1: worker 1 trains to step 8" in out
    assert "worker 1 ended with exit code 3; step 8" in err
    assert scripted.cloud.slices() == []
    assert len(scripted.cloud.calls("queued-resources create")) == 1
    logs = Record("glam-run").folder / "logs"
    assert len(list(logs.iterdir())) == 8


@pytest.mark.slow
def test_three_ends_in_a_row_without_a_new_checkpoint_are_the_end(scripted, glam):
    scripted.ends("134 134 5", *["86 134 5"] * 9)
    code, _, err = glam(*scripted.words)
    assert (code, scripted.starts()) == (86, 4)
    assert "the last of 3 ends in a row without a new checkpoint after step 5" in err
    assert scripted.cloud.slices() == []


@pytest.mark.slow
def test_a_slice_that_is_taken_away_is_asked_for_again(scripted, glam):
    scripted.cloud.plan(preempt=[4, 6], run=str(scripted.run))
    scripted.ends("run run 4", "run run 6", "0 0 20")
    code, _, err = glam(*scripted.words)
    assert (code, scripted.starts()) == (0, 3), err
    assert err.count("the slice is lost") == 2
    assert scripted.cloud.slices() == []


@pytest.mark.slow
def test_requests_that_fail_or_find_no_capacity_are_made_again(scripted, glam):
    stockout = "There is no more capacity in the zone z; you can try in another zone"
    scripted.cloud.plan(create=[stockout, None], states=["PROVISIONING"])
    scripted.ends("0 0 20")
    code, _, err = glam(*scripted.words)
    assert code == 0
    assert f"there is no capacity in z (gcloud: {stockout}); trying again" in err


@pytest.mark.slow
def test_a_request_that_always_fails_is_given_up_and_deleted(scripted, glam):
    scripted.cloud.plan(states=["FAILED"] * 99)
    code, _, err = glam(*scripted.words)
    assert (code, scripted.cloud.slices()) == (7, [])
    assert "5 requests for a slice failed: FAILED (internal error)" in err


@pytest.mark.slow
def test_a_worker_that_never_answers_ends_the_launch_and_is_named(scripted, glam):
    scripted.cloud.plan(unreachable=[1])
    code, _, err = glam(*scripted.words)
    assert (code, scripted.cloud.slices()) == (7, [])
    assert "no answer over ssh from worker 1 (of 2)" in err


REFUSED = {
    "does not have this kind": "INVALID_ARGUMENT: Accelerator type v4-16 not found in zone z",
    "quota for this kind of TPU is 0": "Quota limit 'V4' has been exceeded. Limit: 0 in z",
    "TPU API is disabled": "Cloud TPU API has not been used in project 1 or it is disabled",
    "may not do that": "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
    "name is taken": "ALREADY_EXISTS: Resource 'glam-run' already exists",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_google_refuses_for_good_ends_the_launch_with_advice(scripted, glam, words):
    scripted.cloud.plan(create=[REFUSED[words]])
    code, _, err = glam(*scripted.words)
    assert code == 7
    assert "error: queued-resources create glam-run: " in err
    assert words in err
    assert "\nhint: " in err
    assert Record("glam-run").load().slices == 0
    assert glam("launch", "stop", "glam-run")[0] == 0
    assert not scripted.cloud.calls("queued-resources delete"), "it may be another's"


REFUSED_HERE = {
    "cannot be the name of a slice": ["--name", "Mine"],
    "a relative path is another folder": ["--run", "runs/mine"],
    "a bucket of Google's, gs://": ["--run", "s3://bucket/run"],
    "not the name of one": ["--zone", "us central"],
    "not a path in one line": ["--run", "/a\nb"],
    "is no TPU slice": ["--tpu", "8xh100"],
    "one is launched at a time": ["--tpu", "2xv4-16"],
    "there is no slice `v4-33`": ["--tpu", "v4-33"],
    "the mesh asks for 2 devices": ["--set", "mesh.data=2"],
}


@pytest.mark.parametrize("words", REFUSED_HERE)
def test_what_cannot_work_is_refused_before_the_cloud_is_asked(scripted, glam, words):
    code, _, err = glam(*scripted.words, *REFUSED_HERE[words])
    assert code in (2, 5)
    assert words in err
    assert not (scripted.cloud.folder / "calls").exists()


def test_without_gcloud_or_a_login_nothing_is_asked_for(scripted, glam, monkeypatch):
    scripted.cloud.plan(accounts=[])
    code, _, err = glam(*scripted.words)
    assert (code, err.splitlines()[-2:]) == (
        7,
        ["error: gcloud is not logged in", "hint: gcloud auth login"],
    )
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = glam(*scripted.words)
    assert code == 7
    assert "error: the command `gcloud` is not installed" in err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="there is no real gcloud")
def test_the_real_gcloud_takes_these_words_up_to_its_login(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))  # nobody is logged in there
    cloud = Gcloud("us-central2-b", "p")
    launch = Launch("n", "v4-32", "z", "p", "v4-32", "tpu-ubuntu2204-base", spot=True)
    with open(tmp_path / "held", "w") as held:
        calls = (
            cloud.check,
            lambda: cloud.create(launch, held),
            lambda: cloud.delete("n"),
            lambda: cloud.find("n"),
            lambda: cloud.ssh("n", "true", 60),
            lambda: cloud.scp("n", tmp_path, "there", 60),
        )
        for call in calls:
            with pytest.raises(CloudError, match="gcloud is not logged in"):
                call()


def test_a_dry_run_says_what_would_be_done_and_asks_for_nothing(scripted, glam):
    code, out, err = glam(*scripted.words, "--spot", "--project", "p", "--dry-run")
    assert (code, Record("glam-run").load()) == (0, None)
    assert "costs 25.76 dollars per hour on demand by list price; spot costs less" in err
    asked = (line.strip() for line in out.splitlines() if "gcloud" in line)
    assert next(asked).endswith(" --spot --zone=z --project=p")
    assert f"glam train recipe.yaml --run {scripted.run}" in out
    assert scripted.cloud.slices() == []


def test_a_launch_that_nobody_knows_is_named_with_the_nearest(scripted, glam):
    Record("glam-run").save(Launch("glam-run", "v4-16", "z", None, ended="done"))
    for command in ("status", "logs", "stop"):
        code, _, err = glam("launch", command, "glam-ran")
        assert code == 7
        assert "hint: did you mean `glam-run`?" in err
    assert "glam-run v4-16 none  done" in glam("launch", "list")[1]


def test_the_script_that_is_written_asks_for_the_same_and_starts_on_all_machines(
    scripted, glam, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = glam(*scripted.words, "--spot", "--project", "p", "--write", "script")
    assert (code, out.split(" and ")[0], err) == (0, "wrote glam-run/launch.sh", "")
    assert not (scripted.cloud.folder / "calls").exists()
    assert glam(*scripted.words, "--write", "script")[0] == 7  # nothing is overwritten
    scripted.cloud.plan(states=[])
    scripted.ends("0 0 20")
    done = subprocess.run(["bash", "glam-run/launch.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (created,) = scripted.cloud.calls("queued-resources create")
    assert "--accelerator-type=v4-16" in created
    assert "--spot --zone=z --project=p" in created
    assert done.stdout.count('"attempt": 1') == 2
    assert str(scripted.run) in (tmp_path / "glam-run" / "launch.sh").read_text()
    assert (tmp_path / "glam-run" / "package").stat().st_mode & 0o077 == 0
    scripted.cloud.plan(states=["FAILED"])
    shutil.rmtree(scripted.cloud.folder / "requests")
    failed = subprocess.run(["bash", "glam-run/launch.sh"], capture_output=True, text=True)
    assert (failed.returncode, "the request is FAILED" in failed.stderr) == (1, True)
