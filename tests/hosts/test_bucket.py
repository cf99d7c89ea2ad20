"""Processes that have nothing in common but a bucket are one run, and end as one."""

import json

import pytest

from glamcli.storage import place
from runs import LONG, SMALL, finished
from runs_in_bucket import HASTY, outcome, outcome_in_bucket

pytestmark = pytest.mark.slow

OWN_CACHE = ("--set", "data.cache_dir=null")
SHORT = ("--set", "train.steps=21", "--set", "checkpoints.keep=3")


def apart(folder):
    """A cache for each process, which no other one sees."""
    return {"first": HASTY, "XDG_CACHE_HOME": lambda k: str(folder / f"machine-{k}")}


def test_two_of_which_each_was_killed_end_as_on_a_shared_disk(several, bucket, tmp_path):
    finished(several(tmp_path / "disk", *SHORT))
    url, options = f"{bucket}/run", apart(tmp_path)
    for victim, step in ((1, 9), (0, 18)):
        runs = several(url, *OWN_CACHE, *SHORT, **options)
        runs[0].until_step(step)
        runs[victim].process.kill()
        code, err = runs[1 - victim].finish()
        assert code == 134, err
        assert "is gone" in err
        assert "Traceback" not in err
    finished(several(url, *OWN_CACHE, *SHORT, **options))
    assert outcome_in_bucket(url, tmp_path / "copy") == outcome(tmp_path / "disk")


def test_two_that_are_asked_to_stop_save_and_one_goes_on(several, train, bucket, tmp_path):
    url, options = f"{bucket}/run", apart(tmp_path)
    runs = several(url, *OWN_CACHE, *SMALL, **options)
    runs[0].until_step(9)
    runs[1].process.terminate()
    assert [run.finish()[0] for run in runs] == [75, 75]
    assert json.loads(place(f"{url}/lock.json").read(999))["holder"] == "nobody"
    step = max(outcome_in_bucket(url, tmp_path / "copy")[1], key=int)
    alone = train(url, *SMALL, num_devices=8, first=HASTY, XDG_CACHE_HOME=str(tmp_path / "new"))
    alone.until("say", text=f"continuing from step {step}")
    finished([alone])
    metrics, digests = outcome_in_bucket(url, tmp_path / "copy")
    assert [line["step"] for line in metrics] == sorted(line["step"] for line in metrics)
    assert "40" in digests


def test_of_two_starts_one_trains_until_it_loses_the_run(several, bucket, tmp_path):
    url, options = f"{bucket}/run", apart(tmp_path)
    starts = [several(url, *OWN_CACHE, *SMALL, *LONG, **options) for _ in range(2)]
    while all(run.process.poll() is None for runs in starts for run in runs):
        starts[0][0].process.poll()
