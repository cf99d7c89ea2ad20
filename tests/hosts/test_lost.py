"""What one of two processes loses, and what strangers send, ends no run without clear words."""

import contextlib
import json
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from glamcli.checkpoint import Checkpoints
from runs import AT_THE_TENTH, LONG, SMALL, finished, free_port, weights

pytestmark = pytest.mark.slow

# Process `victim` is killed as soon as it holds its parts of one array.
DIES_READING = """
import os, signal, jax
from glamcli.checkpoint import Checkpoints
restore = Checkpoints.restore
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def dying(checkpoints, *what, **more):
    if checkpoints.host.index == {victim}:
        jax.make_array_from_single_device_arrays = kill
    return restore(checkpoints, *what, **more)
Checkpoints.restore = dying
"""
# Process `victim` is asked to stop once it has begun to save.
STOPPED_SAVING = """
import os, signal
from glamcli.checkpoint import Checkpoints
save = Checkpoints.save
def stopped(checkpoints, step, *what, **more):
    save(checkpoints, step, *what, **more)
    if checkpoints.host.index == {victim} and step == 7:
        os.kill(os.getpid(), signal.{name})
Checkpoints.save = stopped
"""
# Only process 1 gets another array than was saved, as from a disk of its own that is damaged.
MISREADS = """
import jax
from glamcli import stored_arrays
read = stored_arrays._read
def misread(state, wanted):
    arrays = read(state, wanted)
    if jax.process_index() == 1 and state.endswith("/3/state"):
        name = "params/embedding/table"
        parts = [x.data + 1 for x in arrays[name].addressable_shards]
        whole = arrays[name]
        arrays[name] = jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, parts)
    return arrays
stored_arrays._read = misread
"""
FAILS_TO_READ = """
import jax
from glamcli import stored_arrays
read = stored_arrays._read
def failing(state, wanted):
    if jax.process_index() == 1 and state.endswith("/3/state"):
        raise OSError(5, "Input/output error")
    return read(state, wanted)
stored_arrays._read = failing
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_a_checkpoint_is_read_ends_the_other(
    several, train, tmp_path, victim
):
    finished([train(tmp_path / "run", *SMALL, "--set", "train.steps=3", num_devices=8)])
    dies = DIES_READING.format(victim=victim)
    more = (*SMALL, "--set", "train.steps=6")
    runs = several(tmp_path / "run", *more, first=dies)
    ends = [run.finish() for run in runs]
    assert ends[victim][0] == -signal.SIGKILL, ends
    code, err = ends[1 - victim]
    assert code == 134, err
    assert f"process {victim} ({socket.gethostname()}) is gone" in err
    assert "Traceback" not in err
    finished(several(tmp_path / "run", *more))
    assert Checkpoints(tmp_path / "run/checkpoints").latest() == 6


def test_an_error_whose_causes_run_in_a_circle_ends_both(several, tmp_path):
    circle = 'e = DataError("disk 7 is gone"); e.__cause__ = ValueError("x"); '
    circle += "e.__cause__.__context__ = e; raise e"
    fails = AT_THE_TENTH.format(when="== 2", what=circle)
    runs = several(tmp_path / "run", *SMALL, *LONG, first=fails)
    ends = [run.finish() for run in runs]
    assert [code for code, _ in ends] == [3, 3], ends
    assert ends[1][1].count("error: disk 7 is gone\n") == 1
    assert f"process 1 ({socket.gethostname()}) failed: disk 7 is gone\n" in ends[0][1]


@pytest.mark.parametrize(("victim", "name"), [(0, "SIGHUP"), (1, "SIGTERM")])
def test_a_signal_while_a_checkpoint_is_saved_stops_both_after_it(several, tmp_path, victim, name):
    stopped = STOPPED_SAVING.format(victim=victim, name=name)
    runs = several(tmp_path / "run", *SMALL, *LONG, first=stopped)
    ends = [run.finish() for run in runs]
    assert [code for code, _ in ends] == [75, 75], ends
    assert 7 < (Checkpoints(tmp_path / "run/checkpoints").latest() or 0) < 12


def test_a_signal_to_one_while_both_compile_stops_both_before_the_first_step(several, tmp_path):
    runs = several(tmp_path / "run", *LONG)
    runs[0].until("phase", name="compiling")
    runs[1].process.send_signal(signal.SIGTERM)
    ends = [run.finish() for run in runs]
    assert [code for code, _ in ends] == [75, 75], ends
    assert not (tmp_path / "run" / "checkpoints").exists()


class Strangers(threading.Thread):
    """Who connect to a port again and again, send noise, and mostly stay until the end."""

    def __init__(self, port: int):
        super().__init__()
        self.port, self.over, self.num_connected = port, threading.Event(), 0

    def run(self) -> None:
        rng, kept = random.Random(5), []
        while not self.over.wait(0.01):
            with contextlib.suppress(OSError):
                sock = socket.create_connection(("127.0.0.1", self.port), timeout=1)
                kept.append(sock)
                self.num_connected += 1
                sock.sendall(rng.choice([b"", b"[" * 4096, b"{}\n", rng.randbytes(3000)]))
            if len(kept) > 150 or rng.random() < 0.2:
                kept.pop(0 if len(kept) > 150 else -1).close() if kept else None
        for sock in kept:
            sock.close()


def test_strangers_at_the_port_before_and_after_the_meeting_change_nothing(train, tmp_path):
    port = free_port()
    place = ("--coordinator", f"127.0.0.1:{port}", "--num-processes=2", "--process-id")
    settings = (*SMALL, "--set", "train.steps=30")
    first = train(tmp_path / "run", *place, "0", *settings, num_devices=4, GLAM_SECRET="a")
    strangers = Strangers(port)
    strangers.start()
    try:
        while strangers.num_connected < 200:
            assert first.process.poll() is None, first.finish()
            time.sleep(0.1)
        odd = train(tmp_path / "run", *place, "1", *settings, num_devices=4, GLAM_SECRET="b")
        code, err = odd.finish()
        assert code == 2, err
        assert f"process 0 at 127.0.0.1:{port} has another secret than process 1 on" in err
        assert "Traceback" not in err
        name = f"process 1 on {socket.gethostname()}"
        first.until("warn", text=f"{name} came with another secret and was sent away")
        other = train(tmp_path / "run", *place, "1", *settings, num_devices=4, GLAM_SECRET="a")
        first.until_step(1)
        met = strangers.num_connected
        finished([first, other])
        assert strangers.num_connected > met  # jax listens there by then
    finally:
        strangers.over.set()
        strangers.join()


def flip_a_bit(step: Path) -> None:
    """In the array data of a step."""
    data = max(step.glob("state/d/*"), key=lambda path: path.stat().st_size)
    with data.open("r+b") as file:
        file.seek(data.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize("how", ["a flipped bit", "misread by one", "not read by one"])
def test_both_go_back_to_the_same_older_step_and_say_so_once(several, train, tmp_path, how):
    every = (*SMALL, "--set", "every.checkpoint_steps=1", "--set", "train.steps=3")
    finished([train(tmp_path / "run", *every, num_devices=8)])
    if how == "a flipped bit":
        flip_a_bit(tmp_path / "run/checkpoints/3")
        strict = several(tmp_path / "run", *every[:-2], "--set", "train.steps=4", "--strict")
        for code, err in [run.finish() for run in strict]:
            assert code == 4, err
            assert "checkpoints/3 cannot be used" in err
    first = {"misread by one": MISREADS, "not read by one": FAILS_TO_READ}.get(how, "")
    runs = several(tmp_path / "run", *every[:-2], "--set", "train.steps=4", first=first)
    other = finished(runs)[1]
    said = [json.loads(line) for line in runs[0].rest.splitlines()]
    warnings = [event["text"] for event in said if event["event"] == "warn"]
    assert len([text for text in warnings if "checkpoints/3 cannot be used" in text]) == 1
    assert len([text for text in warnings if text.startswith("going back to step 2")]) == 1
    assert "continuing from step 2" in runs[0].rest
    assert "cannot be used" not in other
    assert Checkpoints(tmp_path / "run/checkpoints").latest() == 4


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_both(several, tmp_path):
    every = ("--set", "every.checkpoint_steps=1", "--set", "train.steps=5", "--allow-faults")
    finished(several(tmp_path / "run", *SMALL, *every, GLAM_FAULT="nan_grad@5:1"))
    before, after = (weights(tmp_path / "run", step) for step in (4, 5))
    # Every process wrote its own parts of both.
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert {"step", "bad_steps", "bad_steps_total"} <= changed
    assert not any(name.startswith(("params", "opt_state")) for name in changed), changed
