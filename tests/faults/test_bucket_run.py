"""A run in a bucket ends as one on a disk, whatever happens to it in between."""

import json

import pytest

from bucket import of_any_kind
from glamcli.storage import place
from runs_in_bucket import HASTY, outcome, outcome_in_bucket

pytestmark = pytest.mark.slow


@of_any_kind
def test_killed_and_asked_to_stop_it_ends_as_a_run_on_a_disk(train, bucket, tmp_path):
    assert train(tmp_path / "disk").finish()[0] == 0
    url, options = f"{bucket}/run", {"first": HASTY, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    killed = train(url, **options)
    killed.until_step(18)
    killed.process.kill()
    killed.finish()
    stopped = train(url, **options)
    stopped.until_step(24)
    stopped.process.terminate()
    assert stopped.finish()[0] == 75
    # On another machine: without the working folder.
    options["XDG_CACHE_HOME"] = str(tmp_path / "elsewhere")
    assert train(url, **options).finish()[0] == 0
    metrics, digests = outcome(tmp_path / "disk")
    metrics_there, digests_there = outcome_in_bucket(url, tmp_path / "copy")
    assert metrics_there == metrics
    assert digests_there["40"] == digests["40"]
    assert json.loads(place(f"{url}/lock.json").read(999))["holder"] == "nobody"


# Saves are waited for, as on a disk, where they may be later than the next one.
ONE_BY_ONE = """
from glamcli.step_writers import BucketWriter
save = BucketWriter.save
BucketWriter.save = lambda self, step, args: (save(self, step, args), self._thread.join())[0]
"""


def test_a_run_that_goes_back_by_itself_does_so_in_a_bucket(train, bucket, tmp_path):
    url, sets = f"{bucket}/run", ("guard.on_spike=rewind", "train.max_bad_steps=3")
    sets += ("guard.rewind_skip_batches=2",)
    arguments = ["--allow-faults", *(word for each in sets for word in ("--set", each))]
    bad = {"GLAM_FAULT": ",".join(f"nan_grad@{step}" for step in (18, 19, 20, 21))}
    assert train(tmp_path / "disk", *arguments, **bad).finish()[0] == 0
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, err = train(url, *arguments, first=ONE_BY_ONE, **bad, **cache).finish()
    assert code == 0, err
    metrics, digests = outcome(tmp_path / "disk")
    metrics_there, digests_there = outcome_in_bucket(url, tmp_path / "copy")
    assert metrics_there == metrics
    assert digests_there == digests
    assert "rewinds.jsonl" in place(url).files()
    # Anew: what there was is beside it, whole.
    before = {name: place(f"{url}/{name}").read(1 << 30) for name in place(url).files()}
    fresh = train(url, "--fresh", "--set", "train.steps=10", **cache)
    code, err = fresh.finish()
    assert code == 0, err
    after = {name: place(f"{url}.1/{name}").read(1 << 30) for name in place(f"{url}.1").files()}
    assert after.items() == {k: v for k, v in before.items() if k != "lock.json"}.items()
    metrics, digests = outcome_in_bucket(url, tmp_path / "fresh")
    assert max(line["step"] for line in metrics) == 10
    assert {*digests} <= {"7", "10"}
    assert "10" in digests
    # And goes on where it was, from its own arrays.
    there = train(f"{url}.1", "--set", "train.steps=44", *arguments[1:], **cache)
    there.until("say", text="continuing from step 40")
    assert there.finish()[0] == 0


def test_what_ended_a_run_is_in_the_bucket_with_its_last_metrics(train, bucket, tmp_path):
    url = f"{bucket}/run"
    arguments = ["--allow-faults", "--set", "train.max_bad_steps=3", "--set", "every.log_steps=1"]
    bad = {"GLAM_FAULT": "nan_grad@18+", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, err = train(url, *arguments, **bad).finish()
    assert code == 6
    assert str(tmp_path) not in err, "the working folder is nobody's business"
    assert "3 steps in a row were skipped" in place(f"{url}/failures.json").read(9999).decode()
    metrics, _ = outcome_in_bucket(url, tmp_path / "copy")
    assert max(line["step"] for line in metrics) >= 19
    assert json.loads(place(f"{url}/lock.json").read(999))["holder"] == "nobody"
    cache = str(tmp_path / "cache").encode()
    for name in place(url).files():
        assert cache not in place(f"{url}/{name}").read(1 << 30), name
