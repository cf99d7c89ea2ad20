"""The copy of a run in a bucket that readers of run folders read, on a real server."""

import json
import os

import pytest

from glamcli.errors import CheckpointError
from glamcli.hosts.lock import hold
from glamcli.step_folders import ARRAYS_URL, arrays_of
from glamcli.storage import place
from glamcli.stored_runs import Copy, local, parse_steps, run_of

LINES = b'{"step": 1}\n{"step": 2}\n'


@pytest.fixture
def run(bucket, tmp_path, monkeypatch):
    """The URL of a run with two steps, one set aside, in a bucket that it was moved to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = place(f"{bucket}/runs/r")
    put(url, "lock.json", b'{"holder": "nobody"}')
    put(url, "metrics.jsonl", LINES)
    put(url, "metrics.after-1.jsonl", b"later")
    put(url, "recipe.yaml", b"model: {}")
    put(url, "eval/a.json", b"{}")
    put(url, "eval/unfinished-1.jsonl", b"{}")
    put_steps(url, {"4": "1/2-4", "set-aside/2.1": "1/1-2"})
    return url


def put(url, name, data):
    (url / name).write(data)


def put_steps(url, steps):
    files = {f"{step}/meta/metadata": f"about {place}" for step, place in steps.items()}
    places = {f"{s}/{ARRAYS_URL}": f"gs://old/runs/r/arrays/{p}" for s, p in steps.items()}
    put(url, "steps.json", json.dumps(files | places).encode())
    for each in steps.values():
        put(url, f"arrays/{each}/_METADATA", b"{}")


def content(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in found.items() if not name.startswith(".")}


def test_it_has_the_small_files_and_steps_whose_arrays_are_where_the_run_is_now(run):
    found = content(local(run))
    assert found["metrics.jsonl"] == LINES
    assert found["checkpoints/4/meta/metadata"] == b"about 1/2-4"
    assert found[f"checkpoints/4/{ARRAYS_URL}"].decode() == f"{run}/arrays/1/2-4"
    assert found[f"checkpoints/set-aside/2.1/{ARRAYS_URL}"].decode() == f"{run}/arrays/1/1-2"
    assert {*found} == {
        *("lock.json", "metrics.jsonl", "recipe.yaml", "steps.json"),
        *(
            f"checkpoints/{s}/{f}"
            for s in ("4", "set-aside/2.1")
            for f in ("meta/metadata", ARRAYS_URL)
        ),
    }
    assert {*content(local(run, results=True))} - {*found} == {"eval/a.json"}
    assert local(run / "checkpoints" / "4").name == "4"


def test_only_what_has_changed_is_fetched_and_of_metrics_what_is_new(run, weather):
    copy = Copy(run)
    copy.refresh()
    for lines, expected in ((LINES, []), (LINES + b'{"step": 3}\n', ["metrics.jsonl"])):
        if expected:
            put(run, "metrics.jsonl", lines)
        weather.requests.clear()
        copy.refresh()
        fetched = [path for method, path in weather.requests if "download" in path]
        assert len(weather.requests) == 1 + len(fetched)
        assert [path.split("?")[0].rpartition("%2F")[2] for path in fetched] == expected
    inode = os.stat(copy.folder / "metrics.jsonl").st_ino
    put(run, "metrics.jsonl", LINES + b'{"step": 3}\n' + b'{"step": 4}\n')
    copy.refresh()
    assert os.stat(copy.folder / "metrics.jsonl").st_ino == inode, "appended to"
    assert (copy.folder / "metrics.jsonl").read_bytes().endswith(b'{"step": 4}\n')
    put(run, "metrics.jsonl", b'{"step": 1}\n{"step": 9}\n' + b'{"step": 10}\n' * 9)
    copy.refresh()
    assert (copy.folder / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read(9999)


def test_what_is_gone_there_goes_and_a_step_saved_again_is_another(run):
    folder = local(run)
    time = os.stat(folder / "checkpoints/4/meta/metadata").st_mtime
    assert time == (run / "arrays/1/2-4").listed()["_METADATA"].unix_seconds
    put_steps(run, {"4": "2/1-4", "6": "2/2-6"})
    (run / "recipe.yaml").unlink()
    (run / "metrics.jsonl").unlink()
    assert (local(run, metrics=False) / "metrics.jsonl").exists(), "nobody asked"
    found = content(local(run))
    assert found["checkpoints/4/meta/metadata"] == b"about 2/1-4"
    assert {name.split("/")[1] for name in found if name.startswith("checkpoints")} == {"4", "6"}
    assert not {"recipe.yaml", "metrics.jsonl"} & {*found}


def test_a_copy_that_was_damaged_or_cut_by_a_kill_is_made_whole(run):
    folder = local(run)
    (folder / ".versions.json").write_text("{")
    (folder / "checkpoints/4/meta/metadata").unlink()
    (folder / "recipe.yaml").unlink()
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.truncate(5)
    found = content(local(run))
    assert found["metrics.jsonl"] == LINES
    assert found["checkpoints/4/meta/metadata"] == b"about 1/2-4"
    (folder / "recipe.yaml").unlink()
    assert content(local(run)) == found


@pytest.mark.parametrize(
    "files",
    [
        {"../../x": "a"},
        {"4/../../x": "a"},
        {"/etc/x": "a"},
        {"4": "a"},
        {f"4/{ARRAYS_URL}": "/etc"},
        {f"4/{ARRAYS_URL}": "gs://b/arrays/1/../../x"},
        {"4/meta/metadata": 5},
        [],
    ],
)
def test_steps_cannot_name_files_elsewhere(run, files):
    put(run, "steps.json", json.dumps(files).encode())
    with pytest.raises(ValueError):
        parse_steps(json.dumps(files).encode(), run)
    with pytest.raises(CheckpointError, match=f"{run}/steps.json cannot be used"):
        local(run)


def test_where_no_run_is_one_error_says_so(bucket, run, weather, monkeypatch):
    for url in (f"{bucket}/runs/q", f"{bucket}", "gs://no-such-bucket/run"):
        with pytest.raises(CheckpointError, match=f"no run at {url}"):
            local(place(url))
    weather.fault = lambda method, path: 403
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    with pytest.raises(CheckpointError, match=f"{run}: no permission"):
        local(run)
    weather.fault = lambda method, path: 503
    with pytest.raises(CheckpointError, match=f"{run}: no answer"):
        local(run)


async def at_once(seconds: float) -> None:
    pass


@pytest.mark.parametrize(
    ("url", "run"),
    [
        ("gs://b/r/checkpoints/4", "gs://b/r"),
        ("gs://b/r/checkpoints/set-aside/4.1", "gs://b/r"),
        ("gs://b/r/checkpoints", "gs://b/r"),
        ("gs://b/checkpoints/mine", "gs://b/checkpoints/mine"),
        ("gs://b/checkpoints/mine/checkpoints/4", "gs://b/checkpoints/mine"),
    ],
)
def test_a_step_is_of_the_run_above_it(url, run):
    assert run_of(place(url)) == place(run)


def test_a_reader_that_hangs_does_not_hold_up_others_for_ever(run, monkeypatch):
    copy = Copy(run)
    copy.refresh()
    monkeypatch.setattr("glamcli.stored_runs.PATIENCE_SECONDS", 0.3)
    with (
        hold(copy.folder.with_suffix(".lock"), lambda holder: None),
        pytest.raises(CheckpointError, match=r"being fetched by process \d+ on"),
    ):
        local(run)
    assert local(run) == copy.folder


def test_arrays_of_a_folder_are_in_a_bucket_or_in_it(tmp_path):
    assert arrays_of(tmp_path) == str(tmp_path / "state")
    for url in ("/etc", "file:///etc", "https://h/arrays/1/2-3", "gs://b/x", "gs://b/arrays/1/.."):
        (tmp_path / ARRAYS_URL).write_text(url)
        with pytest.raises(ValueError, match="not the URL of arrays"):
            arrays_of(tmp_path)
    (tmp_path / ARRAYS_URL).write_text("gs://b/run/arrays/1/2-3")
    assert arrays_of(tmp_path) == "gs://b/run/arrays/1/2-3"
