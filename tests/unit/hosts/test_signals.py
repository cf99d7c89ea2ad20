"""The first signal asks, the second leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest

from glamcli.hosts.signals import SIGNALS, listening
from glamcli.progress import Silent


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_is_noted_and_the_program_goes_on(number):
    before = signal.getsignal(number)
    with listening(Silent()) as stop:
        stop.at_once = False
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.signal == number  # at once: no thread is waited for
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_a_request_interrupts(number):
    def prepare_data():
        with listening(Silent()):
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        prepare_data()


def test_a_hangup_that_is_ignored_stays_ignored():
    """As `nohup` starts a program."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(Silent()) as stop:
            stop.at_once = False
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)  # noted after a hangup would be
            assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_signal_that_comes_twice_in_a_moment_is_one_request(at_once):
    """As GNU `timeout` sends it: to the process, and to its group."""
    code = f"""
import time
from glamcli.progress import Silent
from glamcli.hosts.signals import listening
with listening(Silent()) as stop:
    stop.at_once = {at_once}
    try:
        print("ready", flush=True)
        time.sleep(0.6)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    time.sleep(0.3)
    print(stop.signal.name)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out.split() == ["interrupted"] * at_once + ["SIGTERM"]


def test_a_second_request_ends_the_process_even_while_the_main_thread_is_in_c():
    # Key derivation stays in C for minutes, as compilation does; Python's own handlers would wait.
    code = """
import hashlib
from glamcli.progress import Silent
from glamcli.hosts.signals import listening
with listening(Silent()) as stop:
    stop.at_once = False
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT
    assert time.monotonic() - started < 10
    process.stdout.close()
