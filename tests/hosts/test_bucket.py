"""Processes that have nothing in common but a bucket are one run, and end as one."""

import json
import time

import pytest

from bucket import of_any_kind
from glamcli.storage import place
from runs import LONG, SMALL, finished
from runs_in_bucket import HASTY, outcome, outcome_in_bucket

pytestmark = pytest.mark.slow

OWN_CACHE = ("--set", "data.cache_dir=null")
SHORT = (*SMALL, "--set", "train.steps=21")


def owner(url):
    return json.loads(place(f"{url}/lock.json").read(999))["holder"]


# Ends a process that touches what only another one has.
APART = """
import os, sys
mine = os.environ["XDG_CACHE_HOME"]
def touched(event, arguments):
    path = str(arguments[0]) if event == "open" or event.startswith("os.") and arguments else ""
    if "/machine-" in path and not path.startswith(mine):
        os.write(2, f"touched {path}".encode())
        os._exit(99)
sys.addaudithook(touched)
"""


def apart(folder):
    """A cache for each process, which no other one sees."""
    return {"first": HASTY + APART, "XDG_CACHE_HOME": lambda k: str(folder / f"machine-{k}")}


@of_any_kind
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
        assert (owner(url) == "nobody") == (victim == 1)
    finished(several(url, *OWN_CACHE, *SHORT, **options))
    metrics, digests = outcome(tmp_path / "disk")
    metrics_there, digests_there = outcome_in_bucket(url, tmp_path / "copy")
    assert metrics_there == metrics
    assert digests_there["21"] == digests["21"]


def test_two_that_are_asked_to_stop_save_and_one_goes_on(several, train, bucket, tmp_path):
    url, options = f"{bucket}/run", apart(tmp_path)
    in_bucket = ("--set", f"data.cache_dir={bucket}/cache")
    runs = several(url, *in_bucket, *SMALL, "--profile=3:4", **options)
    runs[0].until_step(9)
    runs[1].process.terminate()
    assert [run.finish()[0] for run in runs] == [75, 75]
    assert owner(url) == "nobody"
    traces = {path.rpartition("/")[2].split("-")[0] for path in place(f"{url}/profile").files()}
    assert traces == {"process0", "process1"}
    step = max(outcome_in_bucket(url, tmp_path / "copy")[1], key=int)
    options["XDG_CACHE_HOME"] = str(tmp_path / "machine-2")
    alone = train(url, *in_bucket, *SMALL, num_devices=8, **options)
    alone.until("say", text=f"continuing from step {step}")
    finished([alone])
    metrics, digests = outcome_in_bucket(url, tmp_path / "copy")
    assert [line["step"] for line in metrics] == sorted(line["step"] for line in metrics)
    assert "40" in digests


def test_of_two_starts_one_trains_until_it_loses_the_run(several, bucket, tmp_path):
    url, options = f"{bucket}/run", apart(tmp_path)
    starts = [several(url, *OWN_CACHE, *SMALL, *LONG, **options) for _ in range(2)]
    while not (ended := [runs for runs in starts if runs[0].process.poll() is not None]):
        time.sleep(0.2)
    assert len(ended) == 1
    for code, err in [run.finish() for run in ended[0]]:
        assert code == 4, err
        assert f"run folder {url} is in use by process" in err
    (winner,) = (runs for runs in starts if runs is not ended[0])
    winner[0].until_step(3)
    place(f"{url}/lock.json").write(b'{"holder": "process 1 on another-host"}')
    for run in winner:
        code, err = run.finish()
        assert code == 134, err
        assert f"{url} was taken over by process 1 on another-host" in run.rest + err
