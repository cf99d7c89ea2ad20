"""Each in a process of its own, because it ends it."""

import subprocess
import sys

import pytest


def run(code: str) -> tuple[int, str]:
    start = "import ctypes, os, time\nfrom glamcli.hosts import watchdog\n"
    ended = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stderr


def stuck(hang: str, locked_seconds: float = 10) -> tuple[int, list[str]]:
    code, err = run(
        f"watchdog.LOCKED_SECONDS = {locked_seconds}\n"
        "def train():\n"
        "    last = lambda: os.write(2, b'its last words')\n"
        "    with watchdog.Watchdog(0.2, 'process 1', is_first=False, last=last) as dog:\n"
        "        for step in range(3): dog.beat(f'in step {step} (100%)')\n"
        f"        {hang}\n"
        "train()\n"
    )
    return code, err.splitlines()


def test_a_process_that_hangs_says_where_and_exits_with_86():
    code, (first, *stacks) = stuck("time.sleep(60)")
    assert code == 86
    assert first == "error: process 1 got no further for 0.2 s, in step 2 (100%); its stacks:"
    assert any(" in train" in line for line in stacks)
    assert stacks[-1] == "its last words"


def test_a_process_that_keeps_the_interpreter_locked_shows_its_stacks_and_ends():
    code, stacks = stuck("ctypes.PyDLL(None).sleep(60)", locked_seconds=0)
    assert code == 1
    assert any(" in train" in line for line in stacks)


def test_a_process_that_goes_on_after_the_message_lives():
    code, err = run(
        "with watchdog.Watchdog(0.3, 'x', is_first=False) as dog:\n"
        "    dog.beat('here')\n"
        "    time.sleep(1)\n"
        "    dog.beat('there', 100)\n"
        "    time.sleep(2)\n"
    )
    assert code == 0
    assert err.startswith("error: x got no further for 0.3 s, here;")


@pytest.mark.slow
def test_it_does_not_bite_while_more_time_is_allowed_nor_after_its_end():
    code, err = run(
        "with watchdog.Watchdog(1, 'x') as dog:\n"
        "    dog.beat('here')\n"
        "    dog.beat('compiling', 100); time.sleep(1.5)\n"
        "    dog.beat('here')\n"
        "with watchdog.Watchdog(None, 'y') as dog: dog.beat('here')\n"
        "time.sleep(4.5)\n"
    )
    assert (code, err) == (0, "")
