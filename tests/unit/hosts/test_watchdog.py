"""Each in a process of its own, because it ends it."""

import subprocess
import sys

import pytest

HANGS = {
    "waiting": "time.sleep(60)",
    "with the interpreter's lock": "ctypes.PyDLL(None).sleep(60)",
}


def run(code: str) -> tuple[int, str]:
    start = "import ctypes, time\nfrom glamcli.hosts.watchdog import Watchdog\n"
    ended = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="POSIX timers of the C library")
@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_process_that_hangs_says_where_and_exits_with_86(hang):
    code, err = run(
        "def train():\n"
        "    with Watchdog(0.2, 'process 1', is_first=False) as dog:\n"
        "        for step in range(3): dog.beat(f'in step {step} (100%)')\n"
        f"        {hang}\n"
        "train()\n"
    )
    assert code == 86
    first, *stacks = err.splitlines()
    assert first == "error: process 1 got no further for 0.2 s, in step 2 (100%); its stacks:"
    assert any(" in train" in line for line in stacks)


@pytest.mark.slow
def test_it_does_not_bite_while_more_time_is_allowed_nor_after_its_end():
    code, err = run(
        "with Watchdog(1, 'x') as dog:\n"
        "    dog.beat('here')\n"
        "    dog.beat('compiling', 100); time.sleep(1.5)\n"
        "    dog.beat('here'); dog.rest(); time.sleep(1.5)\n"
        "    dog.beat('here')\n"
        "with Watchdog(None, 'y') as dog: dog.beat('here')\n"
        "time.sleep(4.5)\n"
    )
    assert (code, err) == (0, "")
