"""A working folder and its copy in a bucket, on a real server that may be away or throttle."""

import json
import time
from pathlib import Path

import pytest

from glamcli import atomic, step_folders
from glamcli.storage import place
from glamcli.train.mirror import Mirror

PATIENCE = 60.0


class Folder:
    """A mirror of a run in a new working folder, and what it told."""

    def __init__(self, url: str, folder: Path):
        self.warnings: list[str] = []
        self.losses: list[str] = []
        self.path = folder
        self.mirror = Mirror(
            place(url), folder, self.warnings.append, self.losses.append, waits=(0.05,)
        )
        self.mirror.open()

    def content(self) -> dict[str, bytes]:
        paths = (path for path in self.path.rglob("*") if path.is_file())
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


def test_only_what_has_changed_is_uploaded(open_folder, weather):
    one = open_folder("a")
    for name in "abc":
        (one.path / name).write_text(name)
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    (one.path / "b").write_text("other")
    weather.requests.clear()
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    assert one.mirror.wait(one.mirror.ask(), PATIENCE)
    assert [method for method, _ in weather.requests] == ["POST"]


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
    one.mirror._published = lambda steps: seen.append(json.loads(steps))
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
    place(f"{bucket}/run/../out").write_at(b"of another folder", 0)
    one = open_folder("a")
    here = f"{bucket}/run/arrays/1/1-3"
    assert (one.path / "checkpoints/3/arrays.url").read_text() == here
    assert {*one.content()} == {"checkpoints/3/arrays.url", "checkpoints/3/meta/metadata"}
    assert not (tmp_path / "out").exists()
    assert one.mirror.close(PATIENCE)
    assert json.loads(place(f"{bucket}/run/steps.json").read(999))["3/arrays.url"] == here
