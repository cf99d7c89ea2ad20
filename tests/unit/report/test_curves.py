"""Thinned curves keep what a reader looks for, whatever the metrics hold."""

import base64
import math

import numpy as np
import pytest

from glamcli.report.charts import LoadChart
from glamcli.report.curves import (
    MAX_COLUMNS,
    MAX_NAMES,
    MAX_POINTS,
    Curves,
    Loads,
)
from glamcli.train.metric_files import as_number


def filled(num_steps, value):
    curves = Curves()
    for step in range(1, num_steps + 1):
        curves.add(step, {"step": step, "loss": value(step)})
    return curves


def test_a_short_curve_is_drawn_as_it_is():
    points = filled(MAX_POINTS - 1, float).points("loss")
    assert [tuple(each) for each in points[:2]] == [(1, 1.0, 1.0, 1.0), (2, 2.0, 2.0, 2.0)]
    assert len(points) == MAX_POINTS - 1


@pytest.mark.parametrize("num_steps", [1001, 5000, 40_000])
def test_a_long_curve_has_few_points_and_loses_no_spike_and_no_mean(num_steps):
    curves = filled(num_steps, lambda step: 900.0 if step == 777 else float(step % 7))
    points = curves.points("loss")
    assert MAX_POINTS // 2 <= len(points) <= MAX_POINTS
    assert max(each.high for each in points) == 900.0
    assert min(each.low for each in points) == 0.0
    assert [each.step for each in points] == sorted({each.step for each in points})
    assert points[-1].step == num_steps
    inner = points[1:-1]  # the first and the last range may have fewer steps
    mean = sum(
        float(s % 7) if s != 777 else 900.0 for s in range(points[0].step + 1, inner[-1].step + 1)
    )
    assert math.isclose(sum(each.mean for each in inner) * curves.width, mean)


def test_numbers_that_are_none_are_passed_over_and_names_are_bounded():
    curves = Curves()
    curves.add(3, {"a": None, "b": "1", "c": True, "d": [1.0], "e": math.nan, "f": math.inf})
    curves.add(3, {"g": 10**400, "h": 7, "i": 1e308})
    assert curves.names("") == ["h"]
    curves.add(4, {f"name {number}": 1.0 for number in range(3 * MAX_NAMES)})
    assert len(curves.names("")) == MAX_NAMES
    assert curves.num_left_out == 2 * MAX_NAMES + 1
    assert [as_number(x) for x in (True, 2, -1.5, "3", math.nan)] == [None, 2.0, -1.5, None, None]


def test_steps_that_are_far_apart_take_no_memory():
    curves = Curves()
    for step in (1, 2, 10**15):
        curves.add(step, {"loss": 1.0})
    assert [each.step for each in curves.points("loss")] == [1, 2, 10**15]


def test_loads_are_means_of_few_columns_and_other_shapes_are_counted():
    loads = Loads()
    for step in range(1, 2001):
        loads.add(step, [[0.25, 0.75], [float(step % 2), 0.0]])
    for wrong in (
        None,
        [],
        [[]],
        [[1.0]],
        [[1.0, "x"]],
        [[math.nan, 1.0], [0.0, 0.0]],
        7,
        [[1], [1, 2]],
    ):
        loads.add(2001, wrong)
    steps, shares = loads.columns()
    assert MAX_COLUMNS // 2 <= len(steps) <= MAX_COLUMNS
    assert steps[-1] == 2000
    assert shares.shape == (len(steps), 2, 2)
    assert np.allclose(shares[1:-1, 1, 0], 0.5)
    assert loads.num_left_out == 8


def test_a_heat_map_tells_a_dead_expert_from_one_with_few_tokens():
    shares = np.array([[1 / 16, 1 / 8, 1 / 32, 0.0, 1e-9, 1.0, *[0.0] * 10]])
    chart = LoadChart("load", 0, [1], shares).to_json()
    cells = list(base64.b64decode(chart["cells"]))
    assert cells[:6] == [128, 128 + chart["octave"], 128 - chart["octave"], 0, 1, 255]


def test_every_number_stands_at_its_own_step_and_evaluations_are_not_averaged():
    curves = Curves()
    for step in range(1, 20_101):
        curves.add(step, {"loss": 1.0})
        if step % 5000 == 0:
            curves.add(step, {"eval/t/accuracy/0_shots": step / 1e5, "alarm": 1.0})
        if step % 10 == 0:
            curves.add(step, {"heldout/words": float(step)})
    assert curves.width > 10
    assert [each.step for each in curves.points("alarm")] == [5000, 10_000, 15_000, 20_000]
    scores = curves.points("eval/t/accuracy/0_shots")
    assert [(each.step, each.mean) for each in scores] == [
        (5000, 0.05), (10_000, 0.1), (15_000, 0.15), (20_000, 0.2),
    ]  # fmt: skip
    heldout = curves.points("heldout/words")
    assert MAX_POINTS // 2 <= len(heldout) <= MAX_POINTS
    assert all(each.mean == each.low == each.high == each.step for each in heldout)
