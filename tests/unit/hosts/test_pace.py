import time

import numpy as np

from glamcli.hosts.pace import PACE_KEYS, SLOW_STEPS, Pace


def named(index):
    return f"process {index}"


def test_who_waits_least_is_who_the_others_wait_for():
    pace = Pace(named)
    # A step of 100 ms; process 1 works 60 ms of its own, and then its devices need 40 ms.
    assert pace.add(np.array([[0.1, 0.095], [0.1, 0.04], [0.1, 0.09]])) is None
    assert pace.summary() == dict(zip(PACE_KEYS, (1, 0.1, 0.045), strict=True))
    assert pace.summary() == {}


def test_a_warning_once_for_each_long_time_of_being_slow():
    slow, even = np.array([[0.1, 0.09], [0.1, 0.02]]), np.array([[0.1, 0.09], [0.1, 0.09]])
    pace = Pace(named)
    steps = [slow] * (SLOW_STEPS - 1) + [even] + [slow] * (2 * SLOW_STEPS)
    warnings = [(step, text) for step, told in enumerate(steps) if (text := pace.add(told))]
    ((step, text),) = warnings
    assert step == 2 * SLOW_STEPS - 1
    assert text.startswith("the others wait for process 1: a step takes it 0.1 s, the fastest")


def test_taking_turns_at_being_slow_is_no_straggler():
    one = np.array([[0.1, 0.09], [0.1, 0.02]])
    pace = Pace(named)
    assert all(pace.add(told) is None for told in [one, one[::-1]] * SLOW_STEPS)


def test_waiting_is_measured_apart_from_work():
    pace = Pace(named)
    with pace.waiting():
        time.sleep(0.02)
    time.sleep(0.01)
    seconds, waited = pace.mine()
    assert 0.02 <= waited <= seconds - 0.01
    assert pace.mine()[1] == 0
