"""Steps saved into a bucket and read from it; the server is slow or away, objects are damaged."""

import asyncio
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bucket import SERVERS, forget_servers, of_any_kind, point_to
from glamcli import orbax_setup, step_folders, step_writers, stored_arrays
from glamcli.checkpoint import Checkpoints
from glamcli.errors import CheckpointError, DamagedCheckpoint, SaveFailed
from glamcli.hosts.join import ALONE
from glamcli.step_folders import newest_first
from glamcli.step_writers import StepsInBucket
from glamcli.storage import place
from glamcli.stored_arrays import newest_usable, verify
from runs import free_port

STATE = {"w": jnp.asarray(np.random.default_rng(0).normal(size=40_000), jnp.float32)}
TARGET = {"w": jax.ShapeDtypeStruct((40_000,), jnp.float32, sharding=STATE["w"].sharding)}


def at(step: int) -> dict:
    return {"w": STATE["w"] + step}


@pytest.fixture
def saved(bucket, tmp_path):
    """Checkpoints of a bucket whose small files are published at once."""
    steps = StepsInBucket(f"{bucket}/run/arrays/1", lambda: lambda seconds: True)
    made = Checkpoints(tmp_path / "checkpoints", keep=2, in_bucket=steps)
    yield made
    made.close()


@pytest.fixture
def hasty(monkeypatch):
    """Libraries and the program give up sooner."""

    async def at_once(seconds: float) -> None:
        return

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    monkeypatch.setattr(orbax_setup, "STORE_RETRIES", 1)
    monkeypatch.setattr(stored_arrays, "READ_WAITS", (0.0, 0.0))


def arrays_of(checkpoints: Checkpoints, step: int) -> str:
    return step_folders.arrays_of(checkpoints.folder / str(step))


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, at(step), {})
    assert checkpoints.wait() == step


def test_a_save_returns_before_the_bucket_has_answered_anything(saved, weather):
    asked, answering = threading.Event(), threading.Event()

    def wait(method: str, path: str) -> None:
        asked.set()
        assert answering.wait(60)

    weather.fault = wait
    saved.save(1, at(1), {})
    assert asked.wait(60)
    assert saved.poll() is None
    assert saved.is_saving
    assert saved.steps() == []
    answering.set()
    assert saved.wait() == 1
    verify(saved.folder / "1")
    assert (saved.restore(1, TARGET)["w"] == at(1)["w"]).all()


def test_what_need_not_stay_goes_before_the_step_is_published(saved):
    seen = []
    object.__setattr__(
        saved.in_bucket, "publish", lambda: seen.append(saved.steps()) or (lambda seconds: True)
    )
    for step in (1, 2, 3):
        save(saved, step)
    assert seen == [[1], [2, 1], [3, 2]]


@of_any_kind
@pytest.mark.parametrize("status", [503, 429])
def test_a_bucket_that_fails_for_a_while_is_asked_again(saved, weather, status, hasty, monkeypatch):
    num_faults = iter(range(2))
    weather.fault = lambda method, path: status if next(num_faults, None) is not None else None
    monkeypatch.setattr(orbax_setup, "STORE_RETRIES", 3)
    save(saved, 1)
    verify(saved.folder / "1")


def away(weather, monkeypatch) -> None:
    for kind in SERVERS:
        point_to(f"http://127.0.0.1:{free_port()}", kind, monkeypatch)


@of_any_kind
@pytest.mark.parametrize("is_away", [False, True])
def test_a_save_that_the_bucket_refuses_has_failed_and_says_why(saved, weather, hasty, is_away):
    save(saved, 1)
    with pytest.MonkeyPatch.context() as patch:
        if is_away:
            away(weather, patch)
        weather.fault = lambda method, path: 503
        saved.save(2, at(2), {})
        with pytest.raises(SaveFailed) as caught:
            saved.wait()
    forget_servers()
    assert caught.value.what.startswith(f"saving step 2 failed: {saved.in_bucket.arrays}/2-2")
    told = ("connect", "no answer") if is_away else ("Service Unavailable", "HTTP status 503")
    assert any(words in caught.value.what for words in told), caught.value.what
    assert caught.value.hint == "step 1 is in the bucket"
    weather.fault = lambda method, path: None
    save(saved, 2)
    verify(saved.folder / "2")


def test_a_save_whose_small_files_are_not_uploaded_has_failed(saved):
    answers = iter([False, True, False])
    object.__setattr__(saved.in_bucket, "publish", lambda: lambda seconds: next(answers))
    for step, kept in ((1, "no step"), (3, "step 2")):
        saved.save(step, at(step), {})
        with pytest.raises(SaveFailed, match="files are not uploaded") as caught:
            saved.wait()
        assert caught.value.hint == f"its arrays are; {kept} is in the bucket"
        if step == 1:
            save(saved, 2)


def test_a_save_begins_also_where_an_event_loop_runs(saved):
    async def cell() -> None:
        saved.save(1, at(1), {})

    asyncio.run(cell())
    assert saved.wait() == 1
    verify(saved.folder / "1")


def test_no_save_begins_while_the_one_before_it_holds_copies(saved, weather, monkeypatch):
    answering = threading.Event()
    weather.fault = lambda method, path: not answering.wait(60) or None
    monkeypatch.setattr(step_writers, "SAVE_SECONDS", 0.1)
    saved.save(1, at(1), {})
    with pytest.raises(SaveFailed, match="saving step 1 failed"):
        saved.wait()
    for _ in range(2):
        with pytest.raises(SaveFailed, match="the save before it are still written") as caught:
            saved.save(2, at(2), {})
        assert caught.value.hint == "no step is in the bucket"
    monkeypatch.undo()
    answering.set()
    saved._manager._remains.join(60)
    save(saved, 3)


def test_all_writes_of_a_save_have_one_time_limit(saved):
    limits = []

    class Write:
        def result(self, seconds: float = 0.0) -> None:
            limits.append(seconds)
            if len(limits) == 2:
                raise OSError("enough")
            time.sleep(0.01)

    writer = step_writers.BucketWriter(saved.folder, saved.in_bucket, ALONE, list)
    writer._finish(1, SimpleNamespace(close=list), [Write(), Write()], "gs://b/1", {})
    assert limits[1] < limits[0] <= step_writers.SAVE_SECONDS


def test_a_step_whose_upload_failed_is_saved_again_in_its_place(saved):
    answers = iter([True, False, True])
    object.__setattr__(saved.in_bucket, "publish", lambda: lambda seconds: next(answers))
    save(saved, 1)
    saved.save(2, at(2), {})
    with pytest.raises(SaveFailed):
        saved.wait()
    first = arrays_of(saved, 2)
    save(saved, 2)
    assert (arrays_of(saved, 2) != first, saved.steps()) == (True, [2, 1])


def test_an_error_after_the_description_was_written_is_one_of_the_save(saved):
    def fail():
        raise OSError("no more room")

    object.__setattr__(saved.in_bucket, "publish", fail)
    saved.save(1, at(1), {})
    with pytest.raises(SaveFailed, match="saving step 1 failed: no more room"):
        saved.wait()


FAULTS = {
    "503": lambda weather, _: setattr(weather, "fault", lambda method, path: 503),
    "429": lambda weather, _: setattr(weather, "fault", lambda method, path: 429),
    "403": lambda weather, _: setattr(weather, "fault", lambda method, path: 403),
    "arrays": lambda weather, _: setattr(
        weather, "fault", lambda method, path: 503 if "/d/" in path.replace("%2F", "/") else None
    ),
    "away": away,
}


@of_any_kind
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bucket_that_does_not_answer_is_not_damaged(saved, weather, hasty, fault, monkeypatch):
    save(saved, 1)
    save(saved, 2)
    FAULTS[fault](weather, monkeypatch)
    warned, rejected = [], []
    with pytest.raises(CheckpointError) as caught:
        newest_usable(
            lambda: newest_first(saved.folder),
            lambda folder, meta: saved.restore(int(folder.name), TARGET, warned.append, meta),
            ALONE,
            warned.append,
            reject=rejected.append,
        )
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert arrays_of(saved, 2) in caught.value.what
    assert len(warned) == 2
    assert all("trying again" in words for words in warned)
    assert not rejected


def test_a_bucket_that_answers_again_is_read(saved, weather, hasty):
    save(saved, 1)
    num_faults, warned = iter(range(12)), []
    weather.fault = lambda method, path: 503 if next(num_faults, None) is not None else None
    assert (saved.restore(1, TARGET, warned.append)["w"] == at(1)["w"]).all()
    assert warned


def half(name: str, data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(name: str, data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


@of_any_kind
@pytest.mark.parametrize("which", ["manifest.ocdbt", "d/", "ocdbt.process_0/d/", "_METADATA"])
@pytest.mark.parametrize("damage", [half, flipped, None])
def test_a_damaged_object_is_named_and_the_step_before_taken(saved, which, damage):
    save(saved, 1)
    save(saved, 2)
    folder = place(arrays_of(saved, 2))
    for name in folder.files():
        if name.startswith(which):
            data = (folder / name).read(1 << 30)
            (folder / name).unlink()
            if damage is not None:
                (folder / name).write(damage(name, data))
    warned = []
    step, state = newest_usable(
        lambda: newest_first(saved.folder),
        lambda path, meta: (int(path.name), saved.restore(int(path.name), TARGET, meta=meta)),
        ALONE,
        warned.append,
    )
    assert (state["w"] == at(step)["w"]).all()
    if which != "_METADATA":  # which may say the same with a bit changed
        assert step == 1
        assert f"{folder}" in warned[0]
        assert warned[1] == "going back to step 1: up to 1 steps of training are lost"


def test_an_error_of_the_run_is_not_kept_waiting_by_a_bucket(saved, weather, monkeypatch):
    monkeypatch.setattr("glamcli.checkpoint.LAST_CHANCE_SECONDS", 0.5)
    answering = threading.Event()
    weather.fault = lambda method, path: not answering.wait(60) or None
    saved.save(1, at(1), {})
    writer = saved._manager
    with pytest.raises(ZeroDivisionError), saved:
        raise ZeroDivisionError
    answering.set()
    writer._thread.join(60)
    assert saved.steps() == [], "a save that was given up adds no step later"
