"""What a launcher decides by: states of slices, ends of runs, words of gcloud."""

import pytest

from glamcli.config.chips import load_chips
from glamcli.errors import PlanError
from glamcli.launch.decisions import End, SlicePhase, end_of, phase, wait_seconds
from glamcli.launch.gcloud import TryAgain, meaning
from glamcli.launch.record import Launch
from glamcli.launch.request import launch_name
from glamcli.launch.slices import accelerator_type, image_of
from glamcli.plan.topology import parse_target

CHIPS = load_chips()


@pytest.mark.parametrize(
    ("request_state", "node", "expected"),
    [
        (None, None, SlicePhase.ABSENT),
        (None, "READY", SlicePhase.LOST),  # a request that was deleted without its node
        ("CREATING", None, SlicePhase.WAITING),
        ("WAITING_FOR_RESOURCES", None, SlicePhase.WAITING),
        ("PROVISIONING", "CREATING", SlicePhase.WAITING),
        ("ACTIVE", "CREATING", SlicePhase.WAITING),
        ("ACTIVE", "READY", SlicePhase.READY),
        ("ACTIVE", "REPAIRING", SlicePhase.WAITING),
        ("ACTIVE", "PREEMPTED", SlicePhase.LOST),
        ("ACTIVE", None, SlicePhase.LOST),
        ("SUSPENDING", "READY", SlicePhase.LOST),
        ("SUSPENDED", None, SlicePhase.LOST),
        ("FAILED", None, SlicePhase.FAILED),
        ("DELETING", "READY", SlicePhase.LEAVING),
        ("A_NEW_STATE", None, SlicePhase.WAITING),
    ],
)
def test_a_slice_is_used_in_one_state_only_and_deleted_in_none_that_may_become_it(
    request_state, node, expected
):
    assert phase(request_state, node) is expected


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: 0, 1: 0}, End(0, 0, again=False)),
        ({0: 75, 1: 75}, End(75, 0, again=True)),
        ({0: 134, 1: 4}, End(4, 1, again=False)),
        ({0: 134, 1: 86}, End(134, 0, again=True)),
        ({0: 75, 1: -6}, End(-6, 1, again=True)),
        ({0: 0, 1: 134}, End(134, 1, again=True)),
        ({0: 127}, End(127, 0, again=False)),
        ({0: 130, 1: 134}, End(130, 0, again=True)),
    ],
)
def test_a_cause_that_stays_is_final_whoever_has_it_and_any_other_end_is_not(codes, expected):
    assert end_of(codes) == expected


def test_waits_double_from_the_first_to_five_minutes():
    assert [wait_seconds(n, 15.0) for n in (0, 1, 4, 5, 99)] == [15.0, 30.0, 240.0, 300.0, 300.0]


@pytest.mark.parametrize(
    ("said", "words", "again"),
    [
        ("ERROR: (gcloud.a) You do not currently have an active account selected.", "log", False),
        ("ERROR: (gcloud.a) The required property [project] is not currently set.", "pro", False),
        ("ERROR: (g.a) Permission denied on 'locations/x' (or it may not exist).", "zone", False),
        ("ERROR: (g.a) RESOURCE_EXHAUSTED: Quota limit 'V4' has been exceeded.", "quota", True),
        ("ERROR: (g.a) HttpError: 503 The service is currently unavailable", "answer", True),
        ('ERROR: (g.a) There is no more capacity in the zone "z"', "capacity", True),
        ("something new", "something new", True),
        ("", "no reason", True),
    ],
)
def test_words_of_gcloud_are_kept_and_those_that_may_pass_are_tried_again(said, words, again):
    error = meaning(said, "z", "doing")
    assert words in error.what
    assert isinstance(error, TryAgain) is again


@pytest.mark.parametrize(
    ("name", "accelerator", "image"),
    [
        ("v3-8", "v3-8", "tpu-ubuntu2204-base"),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
        ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_a_slice_has_the_names_that_google_gives_it(name, accelerator, image):
    target = parse_target(name, CHIPS)
    assert (accelerator_type(target), image_of(target)) == (accelerator, image)


@pytest.mark.parametrize("name", ["8xh100", "2xv4-32", "cpu:8"])
def test_what_is_not_one_slice_is_refused(name):
    with pytest.raises(PlanError):
        accelerator_type(parse_target(name, CHIPS))


def test_names_of_launches_are_those_google_takes():
    assert launch_name("/mnt/x/My_Run.7/") == "glam-my-run-7"
    assert len(launch_name("/mnt/" + "long-" * 20)) <= 40
    assert launch_name("gs://bucket/run") == "glam-run"


def test_hours_are_counted_once_and_only_while_there_is_a_slice():
    launch = Launch("a", "v4-8", "z", None, dollars_per_hour=10.0)
    launch.opened(1000.0)
    assert launch.costs
    launch.spans[-1].until = 1000.0 + 3600
    launch.opened(2000.0)  # before the last one was seen gone
    launch.spans[-1].until = 1000.0 + 2 * 3600
    launch.closed()
    assert (launch.hours, launch.dollars, launch.costs) == (2.0, 20.0, False)
