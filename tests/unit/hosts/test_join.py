"""How processes find each other, agree and end; here they are threads of one process."""

import socket
import threading

import jax
import pytest

from glamcli.config.load import load_recipe
from glamcli.data.cache import json_digest
from glamcli.errors import CheckpointError, DataError, HostError, RecipeError
from glamcli.hosts import join, wire
from glamcli.hosts.join import ALONE, Host
from glamcli.hosts.rendezvous import (
    Rendezvous,
    detected_rendezvous,
    given_rendezvous,
    split_address,
)
from glamcli.parallel.mesh import local_rows
from glamcli.train import identity
from unit.hosts.threads import HERE, cut, meet, names, together


def test_values_come_to_all_in_the_order_of_processes():
    def one(index, address):
        line = meet(address, index, 3)
        line.start(lambda *what: None)
        values = [line.gather("first", index), line.gather("second", {"of": [index]})]
        line.close(lambda: None)
        return line.names, values

    for called, values in together(3, one):
        assert called == [f"process {index} ({HERE})" for index in range(3)]
        assert values == [[0, 1, 2], [{"of": [0]}, {"of": [1]}, {"of": [2]}]]


def test_what_is_larger_than_a_message_comes_to_all_in_parts(monkeypatch):
    for module in (wire, join):
        monkeypatch.setattr(module, "MESSAGE_BYTES", 1000)
    large = {'"\\': ['"' * 300, "\u2603" * 300, 0.1], "": {}}

    def one(index, address):
        line = meet(address, index, 3)
        line.start(lambda *what: None)
        host = Host(index, 3, line)
        values = [host.of_first("journal", [large, index][index > 0]), host.of_first("none", {})]
        line.close(lambda: None)
        return values

    assert together(3, one) == [[large, {}]] * 3
    assert ALONE.of_first("journal", large) is large


def test_an_ipv6_address_stands_in_brackets():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    found = together(2, lambda k, at: names(k, 2, at), host="[::1]")
    if any(isinstance(each, RecipeError) for each in found):
        pytest.skip("no IPv6 here")
    assert found[0] == found[1]


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_in_one_process_ends_all_others_once(failing):
    ended = {index: [] for index in range(3)}
    heard = threading.Barrier(3)

    def one(index, address):
        line = meet(address, index, 3)

        def end(*what):
            ended[index].append(what)
            heard.wait(10)

        line.start(end)
        line.gather("all are there", None)
        if index == failing:
            line.fail("no disk", "buy one", 3)
            heard.wait(10)
        return line

    lines = together(3, one)
    for line in lines:
        cut(line)
    told = (f"process {failing} ({HERE}) failed: no disk", "buy one", 3)
    assert ended == {index: [told] * (index != failing) for index in range(3)}


@pytest.mark.parametrize("gone", [0, 2])
def test_a_process_that_is_gone_is_named_to_all_others(gone, monkeypatch):
    monkeypatch.setattr(wire, "GONE_SECONDS", 0.0)
    ended = {index: [] for index in range(3)}
    heard = threading.Barrier(3)

    def one(index, address):
        line = meet(address, index, 3)

        def end(*what):
            ended[index].append(what)
            if index != gone:
                heard.wait(10)

        line.start(end)
        line.gather("all are there", None)
        if index == gone:
            cut(line)
            heard.wait(10)
        return line

    for line in together(3, one):
        cut(line)
    for index in {0, 1, 2} - {gone}:
        ((what, hint, code),) = ended[index]
        assert what.startswith(f"process {gone} ({HERE}) is gone")
        assert hint
        assert code == 134


def test_processes_started_as_different_numbers_are_refused():
    found = together(2, lambda k, at: names(k, 2 + k, at))
    for error in found:
        assert isinstance(error, RecipeError)
        assert error.what == f"process 1 on {HERE} was started as one of 3, process 0 as one of 2"
        assert error.hint == "--num-processes must be the same"


def test_the_same_process_id_twice_is_refused():
    found = together(3, lambda k, at: names(min(k, 1), 3, at))
    assert isinstance(found[0], RecipeError)
    assert found[0].what == f"process 1 came twice: from {HERE} and as process 1 ({HERE})"


def test_who_is_missing_is_told_to_those_who_came():
    found = together(2, lambda k, at: names(k, 4, at, 0.5))
    for error in found:
        assert isinstance(error, HostError)
        assert "process 2, process 3 of 4 did not come" in error.what


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a:1", 2, None), "belong together"),
        ((None, 2, 0), "belong together"),
        (("a", 2, 0), "expected HOST:PORT, got `a`"),
        (("a:0", 2, 0), "expected HOST:PORT"),
        (("a:1", 2, 2), "--process-id is 2, of 2 processes"),
    ],
)
def test_options_that_make_no_sense_are_refused(given, said):
    with pytest.raises(RecipeError, match=said):
        given_rendezvous(*given)


def test_addresses():
    assert given_rendezvous(None, None, None) is None
    assert given_rendezvous("a:1", 2, 1) == Rendezvous("a:1", 2, 1)
    assert split_address("[::1]:80") == ("::1", 80)


def test_slurm_says_where_to_meet_unless_the_process_is_alone(monkeypatch):
    assert detected_rendezvous(1) is None
    for name, value in {
        "SLURM_JOB_ID": "5",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert detected_rendezvous(1) == Rendezvous("127.0.0.1:61445", 4, 2, (1,), "0.0.0.0:61445")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert detected_rendezvous(1) is None
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(RecipeError, match="Slurm does not say"):
        detected_rendezvous(1)


def test_a_process_alone_agrees_with_itself_and_touches_nothing(tmp_path):
    assert ALONE.gather("anything", 3) == [3]
    assert ALONE.shares(tmp_path / "not made") == [True]
    assert list(tmp_path.iterdir()) == []


class Heard(Host):
    """A process that hears prepared answers, by the name of what is gathered."""

    def __init__(self, index, **answers):
        super().__init__(index, 3)
        self.answers = answers

    def gather(self, name, value):
        found = list(self.answers[name])
        found[self.index] = value
        return found


def test_the_odd_process_is_named_with_what_differs():
    recipes = [load_recipe("test-tiny", [f"seed={int(k == 1)}"]).recipe for k in range(3)]
    mine = [identity.of_program(Host(k, 3), recipe) for k, recipe in enumerate(recipes)]
    digests = [json_digest(each) for each in mine]
    heard = Heard(0, digests=digests, differences=[mine[0], mine[1], None])
    with pytest.raises(RecipeError) as caught:
        identity.refuse_differences(heard, mine[0])
    assert caught.value.what == (
        "the processes of this run differ: process 1: `seed` is 1 there, 0 elsewhere"
    )


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (["a", "a", "a"], [None] * 3),
        (
            ["a", "a", "b"],
            [f"items: not the same in process 2 ({HERE}) as in process 0 ({HERE})"] * 3,
        ),
        (
            ["a", DataError("no file x", hint="copy it"), "a"],
            [f"process 1 ({HERE}): no file x", "no file x", f"process 1 ({HERE}): no file x"],
        ),
        ([DataError("none"), DataError("none"), DataError("none")], ["none"] * 3),
    ],
)
def test_what_each_reads_for_itself_is_the_same_or_an_error_in_all(made, said):
    def one(index, address):
        line = meet(address, index, 3)
        line.start(lambda *what: None)

        def make():
            if isinstance(made[index], str):
                return made[index]
            raise made[index]

        try:
            found = Host(index, 3, line).alike("items", make, lambda text: {"text": text})
        except DataError as error:
            found = error
        line.close(lambda: None)  # still in step with each other
        return found

    for mine, found, what in zip(made, together(3, one), said, strict=True):
        assert found == mine if what is None else str(found) == what


def test_processes_may_keep_their_data_in_different_folders():
    ones = [load_recipe("test-tiny", [f"data.cache_dir={k}"]).recipe for k in "ab"]
    first, second = (identity.of_program(Host(0, 2), recipe) for recipe in ones)
    assert first == second


class Wire:
    """Of a process that fails: what it tells, and what it waits for before."""

    def __init__(self, monkeypatch):
        self.done = []
        self.names = ["process 0 (a)", "process 1 (b)"]
        monkeypatch.setattr(join.time, "sleep", lambda seconds: self.done.append("waits"))
        # What would end the tests' own process later.
        monkeypatch.setattr(join.threading.Timer, "start", lambda timer: None)

    def fail(self, what, hint, code):
        self.done.append(code)

    def wait_for_others(self, seconds):
        self.done.append("stays")


def caused(error, *causes):
    """The error, raised from the first cause, that from the second, and so on."""
    for effect, cause in zip((error, *causes), causes, strict=False):
        effect.__cause__ = cause
    return error


def in_a_circle(error, cause):
    """As an error that is raised again while its own effect is handled."""
    error.__cause__, cause.__context__ = cause, error
    return error


BROKEN = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")


@pytest.mark.parametrize(
    ("error", "waits", "code"),
    [
        (BROKEN, True, 1),
        (caused(CheckpointError("saving step 7 failed"), BROKEN), True, 4),
        (caused(CheckpointError("saving step 7 failed"), ValueError("a barrier"), BROKEN), True, 4),
        (caused(CheckpointError("saving step 7 failed"), OSError(28, "full")), False, 4),
        (in_a_circle(CheckpointError("saving failed"), ValueError("a barrier")), False, 4),
        (DataError("no file"), False, 3),
        (KeyboardInterrupt(), False, 130),
    ],
    ids=["step", "save", "inside orbax", "full disk", "circle", "bad input", "interrupted"],
)
def test_what_a_lost_process_may_be_behind_is_told_only_after_the_news(
    monkeypatch, error, waits, code
):
    line = Wire(monkeypatch)
    with pytest.raises(type(error)), Host(0, 2, line).failing_together():  # pyright: ignore
        raise error
    assert line.done == ["waits"] * waits + [code, "stays"]


class Spread:
    """The sharding of rows over devices of which these are this process's."""

    is_fully_addressable = False

    def __init__(self, *held):
        self.held = held

    def addressable_devices_indices_map(self, shape):
        assert shape == (16,)
        return {number: (each,) for number, each in enumerate(self.held)}


@pytest.mark.parametrize(
    ("held", "here"),
    [
        (
            [slice(None)] * 4,
            [range(16)],
        ),  # the batch is split over nothing, or over other processes
        ([slice(4, 8), slice(4, 8), slice(0, 4), slice(0, 4)], [range(8)]),
        ([slice(8, 10), slice(2, 4), slice(0, 2)], [range(4), range(8, 10)]),
    ],
)
def test_a_process_reads_the_rows_its_devices_hold_each_once(held, here):
    assert local_rows(Spread(*held), 16) == tuple(here)
