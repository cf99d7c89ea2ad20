"""Who owns a run in a bucket, and what is left of it when that changes."""

import json

import pytest

from bucket import of_any_kind
from glamcli.errors import CheckpointError
from glamcli.hosts.lease import Lease
from glamcli.progress import Silent
from glamcli.storage import Remote
from glamcli.stored_runs import MOVED, local
from glamcli.train.bucket import move_run_aside, owned
from glamcli.train.working_folder import as_packed, as_written


@pytest.fixture
def run(bucket, tmp_path, monkeypatch):
    """The URL of a run with a step; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = Remote(f"{bucket}/run")
    (url / "metrics.jsonl").write(b"1\n")
    (url / "arrays/1/1-3/d/x").write(b"arrays")
    (url / "steps.json").write(f'{{"3/arrays.url": "{url}/arrays/1/1-3"}}'.encode())
    return url


def folders(tmp_path) -> list[str]:
    return [path.name for path in (tmp_path / "cache/glam/runs").glob("*/*/")]


def test_each_owner_has_a_working_folder_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Lease, "holds", lambda lease: True)
    with owned(run, Silent()) as one:
        (one.folder / "metrics.jsonl").write_bytes(b"1\n2\n")
        # As if it had slept until it was taken for dead.
        (run / "lock.json").unlink()
        with owned(run, Silent()) as two:
            assert len(folders(tmp_path)) == 2
            assert two.folder != one.folder
            assert (one.folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
            assert (two.folder / "metrics.jsonl").read_bytes() == b"1\n"
    with owned(run, Silent()) as three:
        assert folders(tmp_path) == [three.folder.name]


def test_who_loses_a_run_while_it_is_moved_deletes_no_more_of_it(run, monkeypatch):
    monkeypatch.setattr(Lease, "holds", lambda lease: False)
    with pytest.raises(CheckpointError, match="was taken by another process") as refused:
        move_run_aside(run, Silent())
    assert f"it is copied to {run}.1" in str(refused.value)
    assert (run / "metrics.jsonl").read(9) == b"1\n"
    assert (run / "arrays/1/1-3/d/x").read(9) == b"arrays"


@of_any_kind
def test_a_run_that_another_took_while_it_was_copied_stays_whole(run, monkeypatch):
    copy = Remote.copy

    def slowly(url, names, target):
        copy(url, names, target)
        steps = run / "steps.json"
        data, version = steps.read_at()
        steps.write_at(as_written(as_packed(data)), version)  # as a new owner does

    monkeypatch.setattr(Remote, "copy", slowly)
    before = run.files()
    with pytest.raises(CheckpointError, match="written by another process"):
        move_run_aside(run, Silent())
    assert {*before} <= {*run.files()}
    assert b"3/arrays.url" in (run / "steps.json").read(999)


def test_a_run_whose_move_was_killed_says_where_it_is_and_the_next_move_ends_it(run, monkeypatch):
    before = {name: (run / name).read(999) for name in run.files()}

    def killed(url, names):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "remove", killed)
        with pytest.raises(SystemExit):
            move_run_aside(run, Silent())
    with pytest.raises(CheckpointError, match=f"interrupted .* copied {run} to {run}.1$") as start:
        owned(run, Silent()).__enter__()
    assert "go on with the run there, or start anew with `--fresh` again" in str(start.value.hint)
    with pytest.raises(CheckpointError, match=f"copied {run} to {run}.1$"):
        local(run)
    assert move_run_aside(run, Silent()) == run.with_name("run.1")
    assert run.files() == ["lock.json"]
    aside = run.with_name("run.1")
    assert {name: (aside / name).read(999) for name in aside.files()} == before


def test_a_run_whose_copy_is_gone_is_moved_again(run):
    (run / "steps.json").write(json.dumps({MOVED: f"{run}.1"}).encode())
    assert move_run_aside(run, Silent()) == run.with_name("run.1")
    assert (run.with_name("run.1") / "arrays/1/1-3/d/x").read(9) == b"arrays"


def test_a_bucket_that_is_missing_is_told_with_what_to_do(run):
    with pytest.raises(CheckpointError, match="there is no such object or bucket") as refused:
        owned(Remote("gs://no-such-bucket/run"), Silent()).__enter__()
    assert refused.value.hint == "make the bucket, or correct its name in `--run`"


def test_a_folder_of_runs_is_not_moved(run):
    with pytest.raises(CheckpointError, match="is no run, but a folder of runs"):
        move_run_aside(run.parent, Silent())
    assert (run / "metrics.jsonl").exists()
