"""A working folder and its copy in a bucket, on a real server that may be away or throttle."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from bucket import of_any_kind
from glamcli import atomic, step_folders
from glamcli.conditional import ABSENT
from glamcli.errors import CheckpointError
from glamcli.storage import place
from glamcli.train import mirror
from glamcli.train.mirror import Mirror

PATIENCE = 60.0


class Folder:
    """A mirror of a run in a new working folder, and what it told."""

    def __init__(self, url: str, folder: Path):
        self.warnings: list[str] = []
        self.losses: list[str] = []
        self.path, self.owns = folder, True
        about = (lambda: self.owns, self.warnings.append, self.losses.append)
        self.mirror = Mirror(place(url), folder, *about, waits=(0.05,))
        self.mirror.open()

    def content(self) -> dict[str, bytes]:
        paths = (p for p in self.path.rglob("*") if p.is_file() and p.name != ".mirror")
        return {str(path.relative_to(self.path)): path.read_bytes() for path in paths}


@pytest.fixture
def open_folder(bucket, tmp_path):
    opened = []

    def open_one(name: str) -> Folder:
        opened.append(Folder(f"{bucket}/run", tmp_path / name))
        return opened[-1]

    yield open_one
    for each in opened:
        each.mirror.close(0)


def test_what_was_written_is_in_the_next_working_folder(open_folder):
    first = open_folder("a")
    (first.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    (first.path / "tensorboard").mkdir()
    (first.path / "tensorboard" / "events").write_bytes(bytes(range(256)))
    (first.path / ".hidden").write_bytes(b"unfinished")
    assert first.mirror.wait(first.mirror.ask(), PATIENCE)
    with (first.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2}\n')
    (first.path / "tensorboard" / "events").rename(first.path / "tensorboard" / "other")
    assert first.mirror.close(PATIENCE)
    (first.path / ".hidden").unlink()
    assert open_folder("b").content() == first.content()
    assert not first.warnings


@of_any_kind
def test_only_what_has_changed_is_uploaded(open_folder, weather, bucket):
    one = open_folder("a")
    for name in "abc":
        (one.path / name).write_text(name)
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    (one.path / "b").write_text("other")
    weather.requests.clear()
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    write = "PUT" if bucket.startswith("s3") else "POST"
    assert [method for method, _ in weather.requests] == [write]


@of_any_kind
@pytest.mark.parametrize("status", [503, 429, 403])
def test_a_server_that_fails_is_asked_until_it_works(open_folder, weather, status, monkeypatch):
    async def at_once(seconds: float) -> None:
        return

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    one, num_faults = open_folder("a"), iter(range(20))
    weather.fault = lambda method, path: status if next(num_faults, None) is not None else None
    (one.path / "metrics.jsonl").write_text("line\n")
    begun = time.monotonic()
    number = one.mirror.ask()
    assert time.monotonic() - begun < 0.5, "nobody waits for an upload"
    assert one.mirror.wait(number, PATIENCE)
    assert one.warnings
    assert "training goes on" in one.warnings[0]
    one.mirror.close(PATIENCE)
    assert open_folder("b").content() == one.content()


def test_a_file_that_another_process_has_written_is_left_and_told(open_folder, bucket):
    one = open_folder("a")
    (one.path / "metrics.jsonl").write_text("mine\n")
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    two = open_folder("b")
    (two.path / "metrics.jsonl").write_text("theirs\n")
    assert two.mirror.close(PATIENCE)
    (one.path / "metrics.jsonl").write_text("mine\nmine\n")
    one.owns = False
    assert not one.mirror.close(PATIENCE)
    assert one.losses == [f"{bucket}/run/metrics.jsonl: it was written by another process"]
    assert place(f"{bucket}/run/metrics.jsonl").read(99) == b"theirs\n"


def test_a_file_whose_upload_had_no_answer_is_still_this_runs(open_folder, weather, monkeypatch):
    async def at_once(seconds: float) -> None:
        return

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    one, num_faults = open_folder("a"), iter(range(30))
    (one.path / "metrics.jsonl").write_text("line\n")

    def is_lost(method: str, path: str) -> bool:
        weather.fault = lambda method, path: 503 if next(num_faults, None) is not None else None
        weather.is_lost = lambda method, path: False
        (one.path / "metrics.jsonl").write_text("line\nline\n")
        return True

    weather.is_lost = is_lost
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    assert next(num_faults, None) is None, "the answer was lost"
    assert one.mirror.close(PATIENCE)
    assert not one.losses
    assert open_folder("b").content() == one.content()


def test_a_bucket_that_is_gone_is_told_and_nothing_counts_as_uploaded(open_folder, weather):
    one = open_folder("a")
    weather.fault = lambda method, path: 404
    (one.path / "metrics.jsonl").write_text("line\n")
    assert not one.mirror.wait(one.mirror.ask(), 2)
    assert "there is no such object or bucket" in one.warnings[0]


def test_a_step_that_is_renamed_meanwhile_is_in_every_version(open_folder, monkeypatch):
    one, seen, read_text = open_folder("a"), [], Path.read_text
    one.mirror._published = lambda steps: seen.append(json.loads(steps)) or ()
    folder, moving = one.path / "checkpoints", iter("79")
    for step in range(10):
        atomic.write(folder / str(step) / "arrays.url", f"{step}")

    def read_and_move(path: Path) -> str:
        if path.parent.name == "3" and (step := next(moving, None)):
            step_folders.move_aside(folder, step)
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", read_and_move)
    assert one.mirror.close(PATIENCE)
    assert [sorted(texts.values()) for texts in seen] == [sorted("0123456789")]
    assert "set-aside/9/arrays.url" in seen[0]


def test_a_run_that_was_copied_to_another_bucket_has_its_arrays_there(
    open_folder, bucket, tmp_path
):
    files = {"3/arrays.url": "gs://old/run/arrays/1/1-3", "3/meta/metadata": "{}"}
    place(f"{bucket}/run/steps.json").write(json.dumps(files).encode())
    place(f"{bucket}/run/../out").write_at(b"of another folder", ABSENT)
    one = open_folder("a")
    here = f"{bucket}/run/arrays/1/1-3"
    assert (one.path / "checkpoints/3/arrays.url").read_text() == here
    assert {*one.content()} == {"checkpoints/3/arrays.url", "checkpoints/3/meta/metadata"}
    assert not (tmp_path / "out").exists()
    assert one.mirror.close(PATIENCE)
    assert json.loads(place(f"{bucket}/run/steps.json").read(999))["3/arrays.url"] == here


def test_a_working_folder_that_was_deleted_takes_nothing_out_of_the_bucket(open_folder, bucket):
    one = open_folder("a")
    (one.path / "metrics.jsonl").write_text("line\n")
    atomic.write(one.path / "checkpoints/3/arrays.url", f"{bucket}/run/arrays/1/1-3")
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    shutil.rmtree(one.path)
    assert not one.mirror.wait(one.mirror.ask(), 1)
    one.path.mkdir()  # as another run of the same URL would
    assert not one.mirror.close(1)
    assert "was deleted by another program" in one.warnings[0]
    assert place(f"{bucket}/run/metrics.jsonl").read(99) == b"line\n"
    assert "3/arrays.url" in json.loads(place(f"{bucket}/run/steps.json").read(999))


def test_after_the_end_nothing_is_uploaded_and_the_run_is_given_back_then(
    open_folder, bucket, weather, monkeypatch
):
    monkeypatch.setattr(mirror, "_END_SECONDS", 0.0)
    one, is_asked, may_answer = open_folder("a"), threading.Event(), threading.Event()
    for name in "abc":
        (one.path / name).write_text(name)

    def hold(method: str, path: str) -> None:
        is_asked.set()
        may_answer.wait(PATIENCE)

    weather.fault = hold
    one.mirror.ask()
    assert is_asked.wait(PATIENCE)
    released = threading.Event()
    assert not one.mirror.close(0)
    one.mirror.after_end(released.set)
    assert not released.is_set()
    may_answer.set()
    assert released.wait(PATIENCE)
    assert set(place(f"{bucket}/run").files()) == {"a", "steps.json"}


def test_what_is_asked_for_does_not_wait_for_the_next_attempt(open_folder, weather, monkeypatch):
    async def at_once(seconds: float) -> None:
        return

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    one, failing = open_folder("a"), threading.Event()
    one.mirror._waits = (10 * PATIENCE,)
    one.mirror._warn = lambda text: failing.set()
    weather.fault = lambda method, path: 503
    (one.path / "metrics.jsonl").write_text("line\n")
    number = one.mirror.ask()
    assert not one.mirror.wait_while_it_works(number, 0.0)
    assert failing.wait(PATIENCE)
    weather.fault = lambda method, path: None
    assert one.mirror.close(PATIENCE)


def test_an_upload_that_takes_its_time_is_waited_for(open_folder, weather):
    one = open_folder("a")
    (one.path / "metrics.jsonl").write_text("line\n")
    weather.delay = 2.0
    assert one.mirror.wait_while_it_works(one.mirror.ask(), 0.0)


def test_what_is_asked_for_goes_before_what_is_deleted(open_folder):
    one, at_it, may_go_on, seen = open_folder("a"), threading.Event(), threading.Event(), []

    def published(steps: bytes):
        for each in range(2):
            at_it.set()
            assert may_go_on.wait(PATIENCE)
            seen.append((each, one.mirror.has(2)))
            yield

    one.mirror._published = published
    atomic.write(one.path / "checkpoints/3/arrays.url", "x")
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    assert at_it.wait(PATIENCE)
    assert one.mirror.ask() == 2
    may_go_on.set()
    assert one.mirror.wait(2, PATIENCE)
    assert one.mirror.close(PATIENCE)
    assert seen == [(0, False), (1, True)]


@of_any_kind
def test_who_has_lost_the_run_adds_no_step_and_disturbs_no_owner(open_folder, bucket):
    one = open_folder("a")
    (one.path / "metrics.jsonl").write_text("1\n")
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    two, one.owns = open_folder("b"), False
    (one.path / "metrics.jsonl").write_text("1\nlast\n")
    atomic.write(one.path / "checkpoints/9/arrays.url", f"{bucket}/run/arrays/1/1-9")
    assert not one.mirror.close(PATIENCE)
    assert one.losses == [f"{bucket}/run/steps.json: it was written by another process"]
    (two.path / "metrics.jsonl").write_text("1\n2\n")
    assert two.mirror.close(PATIENCE)
    assert not two.losses
    assert place(f"{bucket}/run/metrics.jsonl").read(99) == b"1\n2\n"
    assert [*json.loads(place(f"{bucket}/run/steps.json").read(99))] == ["written"]


def test_what_is_no_run_of_a_bucket_is_refused(open_folder, bucket):
    place(f"{bucket}/run/checkpoints/5/state/d/x").write(bytes(range(256)))
    with pytest.raises(CheckpointError, match="was copied from a disk") as refused:
        open_folder("a")
    assert refused.value.hint
    assert place(f"{bucket}/run").files() == ["checkpoints/5/state/d/x"]
    place(f"{bucket}/run/other/steps.json").write(b"{}")
    with pytest.raises(CheckpointError, match=f"a folder of runs such as {bucket}/run/other"):
        open_folder("a")


def test_a_mirror_that_could_not_be_opened_is_closed_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    one = Mirror(place("gs://none/run"), tmp_path / "file", bool, print, print)
    with pytest.raises(CheckpointError, match="cannot be copied"):
        one.open()
    one.close(PATIENCE)
