"""No slice is left behind unnoticed, and none is rented that nobody wants: one law per way."""

import dataclasses
import threading
from pathlib import Path

import pytest

from glamcli.launch import control, ending
from glamcli.launch.meaning import NotThere, Unclear, meaning
from glamcli.launch.record import Launch, Record
from glamcli.launch.silence import Hearing, Silence

FAST = ending.Patience(0.02, silence=1.0, leaving=20.0, saving=20.0, creating=0.3, elsewhere=5.0)
DENIED = "PERMISSION_DENIED: Permission 'tpu.operations.get' denied on resource"


@pytest.fixture
def words(cloud, tmp_path, monkeypatch):
    """A launch in this process, of one worker whose command ends at once."""
    monkeypatch.setenv("FAKE_GLAM", str(Path(__file__).with_name("fake_glam.sh")))
    monkeypatch.setattr(ending, "PATIENCE", FAST)
    cloud.plan(workers=1, states=[])
    (cloud.folder / "ends").write_text("0 0 20\n" * 9)
    return ("launch", "test-tiny", "--tpu", "v4-8", "--zone", "z", "--run", str(tmp_path / "run"))


@pytest.fixture
def ours(cloud, monkeypatch):
    """A launch with a slice that is ready, as its launcher left them when it died."""
    monkeypatch.setattr(ending, "PATIENCE", FAST)
    monkeypatch.setattr(ending, "MAX_SILENT", 2)
    cloud.rent("glam-run", "ours")
    launch = Launch("glam-run", "v4-8", "z", "p", id="ours", slices=1)
    launch.opened(1.0)
    Record("glam-run").save(launch)
    return launch


def test_the_project_of_a_launch_stays_that_of_its_beginning(words, cloud, glam):
    cloud.plan(create=[DENIED], project="first")
    assert glam(*words)[0] == 7
    cloud.plan(project="second")
    assert glam("launch", "stop", "glam-run")[0] == 0
    assert Record("glam-run").load().project == "first"
    assert cloud.calls("compute tpus") == cloud.calls("--project=first")


@pytest.mark.slow
def test_a_slice_that_came_to_be_though_gcloud_failed_is_used_and_given_back(words, cloud, glam):
    cloud.plan(workers=1, states=[], late=DENIED)
    code, _, err = glam(*words)
    assert code == 0, err
    assert "but there is a slice; trying again" in err
    assert cloud.slices() == []


def test_a_slice_that_was_kept_is_not_forgotten_in_another_zone(ours, words, cloud, glam):
    ours.ended, ours.kept = "done", True
    Record("glam-run").save(ours)
    code, _, err = glam(*words[:4], "--zone", "other", *words[6:])
    assert (code, cloud.calls(" create ")) == (7, [])
    assert "the slice of `glam-run`, which has ended, is still in z" in err
    code, _, err = glam("launch", "stop", "glam-run", "--zone", "other")
    assert (code, cloud.slices()) == (7, ["glam-run"])
    assert "was launched in zone z of project p" in err
    assert "ACTIVE done" in glam("launch", "list")[1]


def test_a_finished_run_whose_launcher_died_deleting_rents_nothing(words, cloud, glam, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(control, "give_back", die)
        assert glam(*words)[0] != 0
    assert cloud.slices() == ["glam-run"]
    code, _, err = glam(*words)
    assert (code, cloud.slices(), len(cloud.calls(" create "))) == (0, [], 1), err
    assert "glam-run: done" in err


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/n' was not found", NotThere),
        ("NOT_FOUND: Resource 'projects/p/locations/z/nodes/n-1' was not found", Unclear),
        ("NOT_FOUND: Requested project 'nope' was not found.", Unclear),
        ("Your credentials file could not be found", Unclear),
        ("Cannot use configuration [n], it does not exist.", Unclear),
    ],
)
def test_only_googles_own_word_means_that_there_is_no_slice(said, kind):
    assert type(meaning(f"ERROR: (gcloud.x) {said}", "z", "describe", "n")) is kind


def test_machines_without_a_request_are_shown_and_deleted(ours, cloud, glam):
    cloud.plan(no_request=True, workers=1)
    assert "slice: no request, its machines READY" in glam("launch", "status", "glam-run")[1]
    code, _, err = glam("launch", "stop", "glam-run")
    assert (code, cloud.slices()) == (0, []), err
    assert cloud.calls("tpu-vm delete glam-run --async")


def test_a_slice_of_another_launch_is_not_touched(ours, cloud, glam):
    cloud.rent("glam-run", "another")
    code, _, err = glam("launch", "stop", "glam-run")
    assert (code, cloud.slices(), cloud.calls(" delete ")) == (0, ["glam-run"], []), err


def test_a_stop_elsewhere_that_finds_no_slice_deletes_the_one_that_is_asked_for_next(
    cloud, glam, monkeypatch
):
    monkeypatch.setattr(ending, "PATIENCE", FAST)
    cloud.plan(workers=0)
    later = threading.Timer(1.5, cloud.rent, ("glam-run", "theirs"))
    later.start()
    code, _, err = glam("launch", "stop", "glam-run", "--zone", "z")
    later.join()
    assert (code, cloud.slices()) == (0, []), err
    assert len(cloud.calls("queued-resources delete")) == 1
    monkeypatch.setattr(ending, "PATIENCE", dataclasses.replace(FAST, elsewhere=0.1))
    code, _, err = glam("launch", "stop", "glam-run", "--zone", "z")
    assert (code, "may still get a slice later: end it there" in err) == (0, True)


def test_stop_says_which_worker_could_not_be_asked_to_save(ours, cloud, glam):
    cloud.plan(unreachable=[1])
    code, _, err = glam("launch", "stop", "glam-run")
    assert (code, cloud.slices()) == (0, [])
    assert "worker 1 did not answer; what it saved before is whole" in err


def test_stop_does_not_wait_forever_for_a_creation_that_hangs(ours, cloud, glam):
    with Record("glam-run").creating():
        code, _, err = glam("launch", "stop", "glam-run")
    assert (code, cloud.slices()) == (7, [])
    assert "is creating the slice, `glam-run`, which may still come" in err
    assert "gcloud compute tpus queued-resources delete glam-run --zone=z --project=p" in err
    assert glam("launch", "stop", "glam-run")[0] == 0
    assert Record("glam-run").load().gone


def test_a_slice_is_replaced_for_a_silent_worker_only():
    hearing = Hearing()
    hearing.all_answer(5)
    hear = [hearing.silent(1e6 + n, 900, heard=False, some=True) for n in range(9)]
    assert set(hear) == {Silence.WAIT}, "a machine that slept heard nothing for long"
    assert hearing.silent(1e6 + 901, 900, heard=False, some=False) is Silence.ALL
    for _ in range(3):
        assert hearing.silent(1e6 + 901, 900, heard=False, some=True) is Silence.REPLACE
    assert hearing.silent(1e6 + 901, 900, heard=False, some=True) is Silence.ENOUGH
    hearing.another_slice()
    verdicts = [hearing.silent(2e6 + 400 * n, 900, heard=False, some=False) for n in range(4)]
    assert verdicts[-1] is Silence.NEVER


def test_a_slice_that_came_while_nobody_looked_is_billed(ours, glam):
    ours.spans.clear()
    Record("glam-run").save(ours)
    assert "about 0.00 dollars" not in glam("launch", "status", "glam-run")[1]


def test_a_damaged_record_hides_no_other_launch(ours, glam):
    damaged = Record("glam-a").folder / "launch.json"
    damaged.parent.mkdir()
    damaged.write_text("")
    _, out, err = glam("launch", "list")
    assert "its record cannot be read" in out
    assert "glam-run v4-8" in out
    assert str(damaged) in err


@pytest.mark.slow
def test_ordinary_failures_do_not_count_as_unknown_ones(words, cloud, glam):
    stockout = "There is no more capacity in the zone z"
    cloud.plan(workers=1, states=[], create=[*[stockout] * 6, "something odd"], failures=8)
    code, _, err = glam(*words)
    assert code == 0, err
    assert "the request for a slice failed: FAILED (internal error); trying again" in err
    assert cloud.slices() == []


@pytest.mark.slow
def test_a_login_that_expires_is_waited_for(words, cloud, glam):
    expired = "Reauthentication failed. cannot prompt during non-interactive execution."
    cloud.plan(workers=1, states=[], create=["There is no more capacity", expired])
    code, _, err = glam(*words)
    assert code == 0, err
    assert "nobody looks after the slice until you log in: gcloud auth login" in err


@pytest.mark.slow
def test_a_start_that_never_takes_effect_ends_the_launch(words, cloud, glam, monkeypatch):
    told = ("worker 0", "no space left")
    monkeypatch.setattr(control.SliceWorkers, "start", lambda *_: told)
    code, _, err = glam(*words)
    assert (code, cloud.slices()) == (7, [])
    assert "start 1 was tried 5 times; worker 0: no space left" in err


@pytest.mark.slow
def test_an_installation_that_hangs_ends_the_launch_and_leaves_no_process(
    words, cloud, glam, tmp_path, monkeypatch
):
    monkeypatch.setattr("glamcli.launch.workers.INSTALL_SECONDS", 1.0)
    shells = tmp_path / "shells"
    alive = f'grep -qs sleep "/proc/$each/cmdline" && echo left >> {shells}'
    setup = f"for each in $(cat {shells}); do {alive} || true; done; echo $$ >> {shells}; sleep 987"
    shells.touch()
    code, _, err = glam(*words, "--setup", setup)
    assert (code, cloud.slices()) == (7, [])
    assert "worker 0: glam was not installed: tpu-vm ssh glam-run: gcloud did not" in err
    assert "in 1 seconds (3 times)" in err
    assert len(shells.read_text().split()) == 3, "none was left by the one before"
