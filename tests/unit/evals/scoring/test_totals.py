"""Scores of whole tasks: worked by hand, and their errors by definition."""

import math
from statistics import stdev

import numpy as np
import pytest

from glamcli.evals.scoring.totals import choice_baselines, mean_and_error, text_baselines, total


def test_standard_error_is_sample_deviation_over_root_n():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean_and_error(values) == pytest.approx((0.6, stdev(values) / math.sqrt(5)))
    assert mean_and_error([1.0]) == (1.0, None)
    found = total("accuracy", [{"accuracy": value} for value in values])
    assert (found.value, found.stderr) == pytest.approx(mean_and_error(values))
    assert found.interval is None


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
    assert total("f1a", MULTIRC).value == pytest.approx(4 / 6)
    found = total("question_em", MULTIRC)
    assert found.value == pytest.approx(1 / 3)
    assert found.stderr == pytest.approx(mean_and_error([1.0, 0.0, 0.0])[1])


def test_f1a_of_nothing_found_or_wanted_is_zero():
    items = [{"group": 1, "gold": 0, "chosen": 0}, {"group": 2, "gold": 0, "chosen": 0}]
    assert total("f1a", items).value == 0


def test_macro_f1_counts_every_class_alike_by_hand():
    pairs = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "no"), ("neither", "yes")]
    items = [{"wanted_class": wanted, "found_class": found} for wanted, found in pairs]
    # yes: 2 right, 3 found, 3 wanted: 2/3; no: 1, 2, 1: 2/3; neither: 0.
    assert total("macro_f1", items).value == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_perplexity_is_per_answer():
    items = [{"answer_nats": -math.log(4)}, {"answer_nats": -math.log(9)}]
    assert total("perplexity", items).value == pytest.approx(6)


def test_intervals_hold_the_score_come_from_the_seed_and_shrink_with_the_items():
    rng = np.random.default_rng(1)
    items = [{"f1": float(value)} for value in rng.uniform(size=400)]
    found = total("f1", items, seed=3)
    assert found == total("f1", items, seed=3)
    assert found.interval != total("f1", items, seed=4).interval
    assert found.interval is not None
    assert found.stderr is not None
    low, high = found.interval
    assert low < found.value < high
    # Of a mean the bootstrap must tell what the formula tells: 1.96 standard errors to each side.
    assert high - low == pytest.approx(2 * 1.96 * found.stderr, rel=0.1)
    few = total("f1", items[:25], seed=3).interval
    assert few is not None
    assert few[1] - few[0] > 2 * (high - low)


def test_resampling_keeps_the_answers_of_a_question_together():
    # One group: every resample is the same, whatever the number of its items.
    alone = [{**item, "group": "q"} for item in MULTIRC]
    assert total("f1a", alone).interval is None
    found = total("f1a", MULTIRC * 1).interval
    assert found is not None
    assert found[0] == 0  # the third question alone has no true answer


def test_baselines_of_fixed_options():
    options = [("no", "yes")] * 4
    found = choice_baselines(options, [(1,), (1,), (1,), (0,)])
    assert found == {"random": 0.5, "position": 0.75, "majority": 0.75}


def test_majority_has_no_meaning_where_options_differ():
    found = choice_baselines([("a", "b"), ("c", "d", "e")], [(0,), (2,)])
    assert found["majority"] is None
    assert found["random"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_where_several_options_are_right_guessing_is_easier():
    found = choice_baselines([("a", "b", "c", "d")] * 2, [(0, 1), (1,)])
    assert found == {"random": pytest.approx(3 / 8), "position": 1.0, "majority": 1.0}


def test_a_constant_guesser_is_caught_by_the_position_baseline():
    options = [(f"a{i}", f"b{i}") for i in range(9)]
    assert choice_baselines(options, [(0,)] * 9)["position"] == 1


def test_majority_answer_of_open_questions():
    answers = [("unanswerable",), ("Unanswerable",), ("Paris", "paris"), ("Rome",)]
    assert text_baselines(answers, "em", "squad")["majority"] == 0.5
    found = text_baselines(answers, "f1", "squad", no_answer="unanswerable")["majority"]
    assert found == 0.5


def test_of_answers_equally_many_accept_the_first_by_alphabet_is_given():
    # "north" overlaps with a third answer, "south" with none.
    answers = [("south", "north"), ("north pole",)]
    for first in (answers[0], answers[0][::-1]):
        found = text_baselines([first, answers[1]], "f1", "squad")["majority"]
        assert found == pytest.approx((1 + 2 / 3) / 2)
