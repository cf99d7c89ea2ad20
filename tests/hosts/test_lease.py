"""A lease has one owner: real processes race for it, are killed and stopped while they hold it."""

import os
import signal
import subprocess
import sys
import time

import pytest

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
    held.release()
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


def test_a_killed_owner_loses_it_and_a_live_one_does_not(bucket):
    owner = start(f"{bucket}/run", 60, hold=60)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    path, told = place(f"{bucket}/run/lock.json"), []
    with pytest.raises(CheckpointError, match=f"is in use by process {owner.pid} on"):
        Lease(path, told.append, told.append)
    owner.kill()
    owner.communicate()
    mine = Lease(path, told.append, told.append)
    assert [f"process {owner.pid} on" in words for words in told] == [True, True]
    mine.release()
    Lease(path, told.append, told.append).release()
    assert len(told) == 2, "one that was given back is taken at once"


def test_an_owner_that_slept_hears_of_its_successor_and_cannot_write(bucket):
    owner = start(f"{bucket}/run", 6, hold=4)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    time.sleep(0.5)
    os.kill(owner.pid, signal.SIGSTOP)
    told = []
    mine = Lease(place(f"{bucket}/run/lock.json"), told.append, told.append)
    place(f"{bucket}/run/counter").write_at(b"successor", 0)
    os.kill(owner.pid, signal.SIGCONT)
    lines = owner.communicate(timeout=60)[0].split("\n")
    assert lines[0].startswith(f"lost 0 {bucket}/run was taken over by process {os.getpid()} on")
    assert lines[1] == "refused"
    assert place(f"{bucket}/run/counter").read(99) == b"successor"
    assert len(told) == 1, "the successor has lost nothing"
    mine.release()
