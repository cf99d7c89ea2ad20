"""A lease has one owner: real processes race for it, are killed and stopped while they hold it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bucket import of_any_kind
from glamcli import conditional
from glamcli.errors import CheckpointError
from glamcli.hosts import lease
from glamcli.hosts.lease import Lease
from glamcli.storage import place

# Takes the lease as often as it can; while it holds it, adds 1 to a counter in two requests, which
# loses some if another does so meanwhile. `hold` makes it keep the lease.
WORKER = """
import sys, time
from glamcli.errors import CheckpointError
from glamcli.hosts import lease
from glamcli.storage import place
url, until, hold = sys.argv[1], time.time() + float(sys.argv[2]), float(sys.argv[3])
lease.RENEW_SECONDS, lease.STALE_SECONDS = 0.1, 1.0 if hold else 5.0
counter, mine = place(url + "/counter"), 0
def lost(why):
    print("lost", mine, why, flush=True)
while time.time() < until:
    try:
        held = lease.Lease(place(url + "/lock.json"), lambda words: None, lost)
    except CheckpointError as error:
        assert "is in use by" in error.what, error.what
        continue
    print("held", flush=True)
    data, generation = counter.read_at()
    time.sleep(0.01 + hold)
    try:
        if hold:
            counter.write_at(b"mine", generation)
        else:
            counter.write(b"%d" % (int(data or b"0") + 1))
        mine += 1
    except FileExistsError:
        print("refused", flush=True)
    held.release(9)
print(mine)
"""


def start(url: str, seconds: float, hold: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, url, str(seconds), str(hold)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)


def test_of_processes_that_race_one_has_it_at_a_time(bucket):
    workers = [start(f"{bucket}/run", 6) for _ in range(3)]
    told = [worker.communicate(timeout=60)[0].split("\n") for worker in workers]
    assert not any(line.startswith("lost") for lines in told for line in lines)
    counts = [int(lines[-2]) for lines in told]
    assert sum(count > 0 for count in counts) > 1, "nobody raced"
    assert int(place(f"{bucket}/run/counter").read(99)) == sum(counts)


def test_a_killed_owner_loses_it_and_a_live_one_does_not(bucket, monkeypatch):
    owner = start(f"{bucket}/run", 60, hold=60)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    path, told = place(f"{bucket}/run/lock.json"), []
    with pytest.raises(CheckpointError, match=f"is in use by process {owner.pid} on"):
        Lease(path, told.append, told.append)
    owner.kill()
    owner.communicate()
    monkeypatch.setattr(lease, "is_dead", lambda process: False)  # as on another machine
    mine = Lease(path, told.append, told.append)
    assert [f"process {owner.pid} on" in words for words in told] == [True, True]
    mine.release(9)
    Lease(path, told.append, told.append).release(9)
    assert len(told) == 2, "one that was given back is taken at once"


def test_an_owner_that_died_on_this_machine_loses_it_at_once(bucket, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 1e6)
    owner = start(f"{bucket}/run", 60, hold=60)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    owner.kill()
    owner.communicate()
    told = []
    Lease(place(f"{bucket}/run/lock.json"), told.append, told.append).release(9)
    assert not told, "nothing was waited for, nothing lost"


def test_a_process_is_dead_only_where_its_number_counts(monkeypatch):
    where, number, began = lease.this_process()
    assert not lease.is_dead([where, number, began])
    assert lease.is_dead([where, number, f"{int(began) - 1}"]), "its number was given anew"
    assert not lease.is_dead([f"{where}0", number, "1"]), "another machine or container"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert lease.is_dead([where, ended.pid, "1"]), "nobody has looked how it ended"
    ended.wait()
    assert lease.is_dead([where, ended.pid, "1"])
    with monkeypatch.context() as hidden:  # /proc does not show who lives, of other users
        hidden.setattr(lease, "_began", lambda number: Path("/none").read_text())
        assert not lease.is_dead([where, number, began])
        assert not lease.is_dead([where, 1, began])
        assert lease.is_dead([where, ended.pid, "1"])
    for strange in (None, {}, [], [where], [where, "x", "y"], 7):
        assert not lease.is_dead(strange)


def test_an_owner_whose_store_is_away_goes_on_and_hears_of_a_successor(bucket, weather):
    told = []
    path, lost = place(f"{bucket}/run/lock.json"), threading.Event()
    mine = Lease(path, told.append, lambda why: (told.append(why), lost.set()))
    weather.fault = lambda method, path: 403
    time.sleep(3 * lease.STALE_SECONDS)
    assert not lost.is_set()
    weather.fault = lambda method, path: None
    path.write(b'{"holder": "process 1 on another"}')
    assert lost.wait(60)
    assert told == [f"{bucket}/run was taken over by process 1 on another"]
    mine.release(9)
    assert b"another" in path.read(99), "what is lost is not given back"


@of_any_kind
def test_an_answer_that_gets_lost_loses_nothing(bucket, weather, monkeypatch):
    async def at_once(seconds: float) -> None:
        return

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    told, num_faults, is_over = [], iter(range(20)), threading.Event()
    path = place(f"{bucket}/run/lock.json")
    mine = Lease(path, told.append, told.append)

    def fault(method: str, path: str) -> int | None:
        if next(num_faults, None) is None:
            is_over.set()
        return None if is_over.is_set() else 503

    def is_lost(method: str, path: str) -> bool:
        weather.fault, weather.is_lost = fault, lambda method, path: False
        return True

    weather.is_lost = is_lost
    assert is_over.wait(60)
    time.sleep(3 * lease.RENEW_SECONDS)
    assert not told
    mine.release(9)
    assert json.loads(path.read(999))["holder"] == lease.RELEASED


def test_an_owner_that_slept_hears_of_its_successor_and_cannot_write(bucket):
    owner = start(f"{bucket}/run", 6, hold=4)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    time.sleep(0.5)
    os.kill(owner.pid, signal.SIGSTOP)
    told = []
    mine = Lease(place(f"{bucket}/run/lock.json"), told.append, told.append)
    place(f"{bucket}/run/counter").write_at(b"successor", conditional.ABSENT)
    os.kill(owner.pid, signal.SIGCONT)
    lines = owner.communicate(timeout=60)[0].split("\n")
    assert lines[0].startswith(f"lost 0 {bucket}/run was taken over by process {os.getpid()} on")
    assert lines[1] == "refused"
    assert place(f"{bucket}/run/counter").read(99) == b"successor"
    assert len(told) == 1, "the successor has lost nothing"
    mine.release(9)


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_server_that_ignores_a_condition_is_refused(bucket, monkeypatch, header):
    async def ignoring(fs, bucket, name, data, version):
        about = {"Bucket": bucket, "Key": name, "Body": data}
        if ("If-Match" if version else "If-None-Match") == header:
            return (await fs._call_s3("put_object", **about))["ETag"]
        return await write(fs, bucket, name, data, version)

    write = conditional._write_s3
    monkeypatch.setattr(conditional, "_write_s3", ignoring)
    path = place(f"{bucket}/run/lock.json")
    with pytest.raises(CheckpointError, match=f"its server ignores `{header}`"):
        Lease(path, pytest.fail, pytest.fail)
    assert json.loads(path.read(999))["holder"] == lease.RELEASED


def test_it_is_given_back_though_the_answer_to_its_last_renewal_got_lost(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1e6)
    path = place(f"{bucket}/run/lock.json")
    mine = Lease(path, lambda words: None, pytest.fail)
    path.write(mine._content(mine._me))
    mine.release(60)
    assert json.loads(path.read(999))["holder"] == lease.RELEASED
