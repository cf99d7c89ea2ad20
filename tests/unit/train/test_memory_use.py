"""The most memory that any process and device of a run holds."""

from pathlib import Path

import numpy as np
import pytest

from glamcli.train import memory_use
from glamcli.train.memory_use import MEMORY_KEYS, MemoryUse, resident_bytes


class Device:
    def __init__(self, told):
        self.told = told

    def memory_stats(self):
        if self.told == "nothing":
            raise NotImplementedError
        return self.told


def device(held, peak):
    return Device({"bytes_in_use": held, "peak_bytes_in_use": peak})


def test_the_most_of_any_device_process_and_step_counts_once():
    use = MemoryUse([device(3, 9), device(5, 6), Device({}), Device(None), Device("nothing")])
    assert use.mine()[1:] == (5, 9)
    use.add(np.array([[100, 5, 9], [300, 4, 12]], np.float32))
    use.add(np.array([[200, 7, 9], [np.nan, np.nan, np.nan]], np.float32))
    assert use.summary() == dict(zip(MEMORY_KEYS, (300, 7, 12), strict=True))
    assert use.summary() == {}


def test_devices_that_tell_nothing_are_no_number():
    use = MemoryUse([Device(None), Device("nothing")])
    use.add(np.array([use.mine()]))
    assert list(use.summary()) == ["memory/process_bytes"]


def test_resident_memory_follows_what_is_held(monkeypatch):
    before = resident_bytes()
    held = np.ones(1 << 27, np.uint8)
    grown = resident_bytes() - before
    assert 0.9 * held.nbytes < grown < 1.5 * held.nbytes
    monkeypatch.setattr(memory_use, "_STATM", Path("/nowhere/statm"))
    assert np.isnan(resident_bytes())


@pytest.mark.parametrize("number", [1, 2])
def test_numbers_that_are_not_known_cost_no_warning(number, recwarn):
    MemoryUse().add(np.full((number, 3), np.nan, np.float32))
    assert not recwarn
