"""Every second of a run is of one kind, and a loop that waits for its data is told whose."""

import numpy as np
import pytest

from glamcli.train.times import TIME_KEYS, TIME_KINDS, WAIT_STEPS, WARN_STEPS, Times


class Hand:
    """A clock that only this test moves."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


class Sums:
    """What a step computes, ready or not when the next batch has come."""

    def __init__(self, is_ready):
        self.is_ready = lambda: is_ready


def run(times, clock, waits, *, is_ready=True):
    """Steps of a second, which wait so long for the batch after them; the warnings by step."""

    def read():
        for wait in waits:
            clock.pass_(wait)
            yield wait

    batches, warnings = times.batches(read(), {"web": 3.0, "books": 1.0}), {}
    with times.spent("step"):
        for step, wait in enumerate(waits, 1):
            clock.pass_(1.0 - wait)
            next(batches)
            if warning := times.step(Sums(is_ready)):
                warnings[step] = warning
    return warnings


def test_the_kinds_add_up_to_the_clock():
    clock = Hand(100.0)
    times = Times(90.0, clock)
    clock.pass_(2)
    times.of("data", clock.pass_, 30)
    times.of("compile", clock.pass_, 7)
    with times.spent("step"):
        clock.pass_(50)
        with times.spent("eval"):
            clock.pass_(4)
            times.of("compile", clock.pass_, 1)
        times.of("save", clock.pass_, 3)
        clock.pass_(20)
    clock.pass_(1)
    expected = {"start": 13, "data": 30, "compile": 8, "step": 70, "eval": 4, "save": 3}
    assert times.seconds() == {**dict.fromkeys(TIME_KINDS, 0), **expected}
    assert sum(times.seconds().values()) == clock.now - 90
    summary = times.summary()
    assert tuple(summary) == TIME_KEYS
    assert summary["goodput"] == pytest.approx(70 / 128, abs=1e-4)
    assert str(times) == (
        "2:08 in all, 54.7% training (goodput), 23.4% preparing data, 10.2% starting, "
        "6.2% compiling, 3.1% evaluating, 2.3% saving"
    )


def test_time_goes_on_as_the_checkpoint_says_and_what_came_after_it_is_lost():
    clock = Hand()
    first = Times(0.0, clock)
    first.of("step", clock.pass_, 60)
    saved = {**first.seconds(), "of another version": 5.0}
    clock.now = -86_400  # another process, another clock
    resumed = Times(None, clock)
    resumed.go_on(saved, 60 + 12.5)
    resumed.of("step", clock.pass_, 20)
    assert resumed.seconds() == {**dict.fromkeys(TIME_KINDS, 0), "step": 80, "lost": 12.5}
    again = Times(None, clock)
    again.go_on(resumed.seconds(), 80 + 12.5 + 1.5)
    assert again.seconds()["lost"] == 14
    unheard = Times(None, clock)
    unheard.go_on(saved, 0.0)
    assert unheard.seconds()["lost"] == 0


def test_a_wait_for_data_counts_when_the_devices_have_nothing_to_do():
    for is_ready, waited in ((True, 3.0), (False, 0.0)):
        clock = Hand()
        times = Times(0.0, clock)
        run(times, clock, [0.0, 1.0, 1.0, 1.0], is_ready=is_ready)
        assert times.seconds()["data_wait"] == waited
        assert sum(times.seconds().values()) == clock.now


def test_a_loop_that_waits_for_its_data_is_told_whose_once():
    clock = Hand()
    times = Times(0.0, clock)
    slow = [0.25] * (WAIT_STEPS + 15)
    warned = run(times, clock, slow)
    assert warned == {
        WAIT_STEPS + 1: "training waits for its data for 25% of the time; most of the reading is "
        "of source `web`"
    }
    well = [0.0] * WAIT_STEPS
    assert run(times, clock, [*well, *slow, *well]) == {}  # so soon it says nothing new
    assert len(run(times, clock, well * (WARN_STEPS // WAIT_STEPS) + slow)) == 1
    nearly = [0.15] * WAIT_STEPS  # and in between it had not been well
    assert run(times, clock, ([*nearly, *slow] * (WARN_STEPS // WAIT_STEPS))) == {}


@pytest.mark.parametrize(("wait", "is_ready"), [(0.15, True), (0.9, False)])
def test_a_loop_that_keeps_its_devices_busy_is_not_told(wait, is_ready):
    clock = Hand()
    assert run(Times(0.0, clock), clock, [wait] * 60, is_ready=is_ready) == {}


def test_a_wait_during_which_the_devices_computed_is_none():
    """Steps of 100 ms: the first batches were read ahead, each later one takes 101 ms or 150."""
    for wait, expected in ((0.101, 0.001), (0.15, 0.05)):
        clock = Hand()
        times = Times(0.0, clock)
        batches = times.batches(map(clock.pass_, [0.0] * 5 + [wait] * 40), {"web": 1.0})
        warned = []
        with times.spent("step"):
            for number in range(45):
                next(batches)
                is_ready = number >= 5
                warned.append(times.step(Sums(is_ready)))
                clock.pass_(0.1 if 0 < number < 5 else 0.0)  # for the numbers of the step before
        assert times.seconds()["data_wait"] == pytest.approx(40 * expected, abs=1e-3)
        assert any(warned) == (wait == 0.15)


def test_numbers_that_are_there_already_are_ready():
    assert Times(0.0, Hand()).step({"loss": np.float32(1.0)}) is None
