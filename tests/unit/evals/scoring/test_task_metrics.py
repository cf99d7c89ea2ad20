"""Scores of whole tasks: worked by hand, and their errors by definition."""

import math
from statistics import stdev

import numpy as np
import pytest

from glamcli.evals.scoring.choice import _best_options
from glamcli.evals.scoring.task_metrics import Total


def test_standard_error_is_sample_deviation_over_root_n():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = Total("accuracy", [{"accuracy": value} for value in values])
    assert (found.value, found.stderr) == pytest.approx((0.6, stdev(values) / math.sqrt(5)))
    assert found.interval is None
    assert Total("accuracy", [{"accuracy": 1.0}]).stderr is None


# Three questions: all three answers right; one of two wrong; a false one taken for true.
MULTIRC = [
    {"group": "q1", "gold": 1, "chosen": 1},
    {"group": "q1", "gold": 0, "chosen": 0},
    {"group": "q1", "gold": 1, "chosen": 1},
    {"group": "q2", "gold": 1, "chosen": 0},
    {"group": "q2", "gold": 0, "chosen": 0},
    {"group": "q3", "gold": 0, "chosen": 1},
]


def test_multirc_by_hand():
    # Of true answers 3 wanted, 3 found, 2 of them rightly: F1a = 2 x 2 / (3 + 3).
    assert Total("f1a", MULTIRC).value == pytest.approx(4 / 6)
    found = Total("question_em", MULTIRC)
    assert found.value == pytest.approx(1 / 3)
    assert found.stderr == pytest.approx(stdev([1.0, 0.0, 0.0]) / math.sqrt(3))


def test_f1a_of_nothing_found_or_wanted_is_zero():
    items = [{"group": 1, "gold": 0, "chosen": 0}, {"group": 2, "gold": 0, "chosen": 0}]
    assert Total("f1a", items).value == 0


def test_macro_f1_counts_every_class_alike_by_hand():
    pairs = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "no"), ("neither", "yes")]
    items = [{"wanted_class": wanted, "found_class": found} for wanted, found in pairs]
    # yes: 2 right, 3 found, 3 wanted: 2/3; no: 1, 2, 1: 2/3; neither: 0.
    assert Total("macro_f1", items).value == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_macro_f1_averages_the_classes_of_the_task_and_not_those_seen():
    items = [{"wanted_class": "no", "found_class": found} for found in ("no", "no", "maybe")]
    # no: 2 right, 2 found, 3 wanted: 0.8. What is no class of any item adds none.
    assert Total("macro_f1", items).value == pytest.approx(0.8)
    classes = ["yes", "no", "neither"]
    fixed = [{**item, "classes": classes} for item in items]
    assert Total("macro_f1", fixed).value == pytest.approx(0.8 / 3)


def test_the_best_options_are_all_that_tie_and_a_nan_chooses_none():
    assert _best_options([-2.0, -1.0, -1.5]) == (1,)
    assert _best_options([-1.0, -2.0, -1.0]) == (0, 2)
    assert _best_options([-1.0, math.nan]) == ()


def test_of_options_that_tie_each_counts_alike():
    tied = {"group": 1, "gold": 1, "chosen": 0, "tied": [0, 1], "wanted_class": "yes",
            "found_class": "no", "options": [{"text": "no"}, {"text": "yes"}]}  # fmt: skip
    right = {"group": 1, "gold": 1, "chosen": 1, "wanted_class": "yes", "found_class": "yes"}
    # 1.5 found rightly, 1.5 found, 2 wanted.
    assert Total("f1a", [tied, right]).value == pytest.approx(3 / 3.5)
    assert Total("question_em", [tied, right]).value == 0.5
    assert Total("macro_f1", [tied, right]).value == pytest.approx(3 / 3.5)
    assert Total("f1a", [tied, right]).of_items == [0.5, 1.0]
    assert Total("macro_f1", [tied]).of_items == [0.5]


def test_an_item_of_which_nothing_is_chosen_is_wrong():
    nothing = {"group": 1, "gold": 0, "chosen": None, "wanted_class": "a", "found_class": None}
    assert Total("question_em", [nothing]).value == 0
    assert Total("macro_f1", [nothing]).value == 0


def test_perplexity_is_per_answer():
    items = [{"answer_nats": -math.log(4)}, {"answer_nats": -math.log(9)}]
    assert Total("perplexity", items).value == pytest.approx(6)


def test_intervals_hold_the_score_come_from_the_seed_and_shrink_with_the_items():
    rng = np.random.default_rng(1)
    items = [{"f1": float(value)} for value in rng.uniform(size=400)]
    found = Total("f1", items, seed=3)
    assert found.interval == Total("f1", items, seed=3).interval
    assert found.interval != Total("f1", items, seed=4).interval
    assert found.interval is not None
    assert found.stderr is not None
    low, high = found.interval
    assert low < found.value < high
    # Of a mean the bootstrap must tell what the formula tells: 1.96 standard errors to each side.
    assert high - low == pytest.approx(2 * 1.96 * found.stderr, rel=0.1)
    few = Total("f1", items[:25], seed=3).interval
    assert few is not None
    assert few[1] - few[0] > 2 * (high - low)


def test_resampling_keeps_the_answers_of_a_question_together():
    # One group: every resample is the same, whatever the number of its items.
    alone = [{**item, "group": "q"} for item in MULTIRC]
    assert Total("f1a", alone).interval is None
    found = Total("f1a", MULTIRC * 1).interval
    assert found is not None
    assert found[0] == 0  # the third question alone has no true answer
