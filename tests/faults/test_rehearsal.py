"""`GLAM_FAULT` through the whole program: what each kind does, and that the run survives it."""

import signal
import time
from pathlib import Path

import pytest

from glamcli.checkpoint import Checkpoints
from runs import STEPS, assert_same_run, is_stopped, metrics


@pytest.fixture
def rehearse(train, tmp_path):
    """Runs to the end with this fault; exit code, stderr, and the texts of what it said."""

    def to_the_end(fault: str, *arguments: str):
        run = train(tmp_path / "run", "--allow-faults", *arguments, GLAM_FAULT=fault)
        said = [str(event.get("text")) for event in run.events()]
        return *run.finish(), said

    return to_the_end


def goes_on(train, folder: Path, uninterrupted: Path) -> list[str]:
    """Starts the run again without faults; it ends as if nothing had happened."""
    run = train(folder)
    said = [str(event.get("text")) for event in run.events()]
    code, err = run.finish()
    assert code == 0, err
    assert_same_run(uninterrupted, folder)
    return said


def test_a_fault_without_permission_is_refused_before_anything_is_made(train, tmp_path):
    code, err = train(tmp_path / "run", GLAM_FAULT="kill@3").finish()
    assert code == 2
    assert "error: GLAM_FAULT is set" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "newest"),
    [
        ("kill@20", -signal.SIGKILL, (None, 7, 14)),  # what was begun need not be complete
        ("kill_save@14", -signal.SIGKILL, (7,)),
        ("term@10", 75, range(10, 14)),
        ("hup@10", 75, range(10, 14)),
        ("term@10,kill_save@10+", -signal.SIGKILL, (7,)),  # no time is left for the save
        ("bad_record@12", 3, (11,)),
    ],
)
def test_a_run_that_ends_at_a_fault_goes_on_as_if_nothing_had_happened(
    rehearse, train, uninterrupted, tmp_path, fault, code, newest
):
    found, err, said = rehearse(fault)
    assert found == code, err
    assert "Traceback" not in err
    assert any(f"GLAM_FAULT={fault}" in text for text in said)
    latest = Checkpoints(tmp_path / "run/checkpoints").latest()
    assert latest in newest
    said = goes_on(train, tmp_path / "run", uninterrupted)
    assert latest is None or f"continuing from step {latest}" in said


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["enospc@14", "eio@7,eio@28"])
def test_a_save_that_fails_costs_nothing_but_that_save(rehearse, uninterrupted, tmp_path, fault):
    code, err, said = rehearse(fault)
    assert code == 0, err
    assert any("saving step" in text and "failed" in text for text in said)
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "why", "spikes"),
    [("nan_grad@12", "gradients are not finite", 0), ("spike@12", "above the", 1)],
)
def test_a_step_whose_loss_is_no_number_or_a_spike_is_skipped_and_counted(
    rehearse, train, tmp_path, fault, why, spikes
):
    code, err, said = rehearse(f"{fault},term@20")
    assert code == 75, err
    assert train(tmp_path / "run").finish()[0] == 0
    assert [text for text in said if text.startswith("step 12: ") and why in text]
    lines = [line for line in metrics(tmp_path / "run") if "bad_steps_total" in line]
    totals = ("step", "bad_steps_total", "spikes_total", "rewinds_total")
    assert [lines[-1][name] for name in totals] == [STEPS, 1, spikes, 0]


@pytest.mark.slow
def test_steps_that_are_never_good_again_end_the_run_which_names_a_step_from_before(rehearse):
    code, err, _ = rehearse("nan_grad@17+")
    assert code == 6
    assert "10 steps in a row were skipped, up to step 26" in err
    assert "last good checkpoint: step 14" in err


@pytest.mark.slow
def test_flipped_bits_cost_the_steps_since_the_step_before_and_are_told(
    rehearse, train, uninterrupted, tmp_path
):
    code, err, _ = rehearse("flip@14+,kill@24")
    assert code == -signal.SIGKILL, err
    said = goes_on(train, tmp_path / "run", uninterrupted)
    assert [text for text in said if "checkpoints/14 cannot be used" in text]
    assert [text for text in said if text.startswith("going back to step 7")]
    assert "continuing from step 7" in said


@pytest.mark.slow
def test_a_stopped_process_goes_on_when_it_is_let(train, uninterrupted, tmp_path):
    run = train(tmp_path / "run", "--allow-faults", GLAM_FAULT="stop@10")
    run.until_step(6)
    while not is_stopped(run.process.pid):
        time.sleep(0.05)
    run.process.send_signal(signal.SIGCONT)
    code, err = run.finish()
    assert code == 0, err
    assert_same_run(uninterrupted, tmp_path / "run")
