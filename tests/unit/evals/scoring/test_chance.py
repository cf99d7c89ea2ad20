"""What guessing scores, worked by hand."""

import dataclasses
import math

import pytest

from glamcli.evals.asking.question import Question
from glamcli.evals.scoring.chance import _choice_baselines, chance
from glamcli.evals.tasks.schema import Task

TASK = {"data": {"path": "a.jsonl"}, "prompt": "{q}"}


def question(options, accepted):
    return Question((), (), accepted, (), "a.jsonl:1", "key", options)


def baselines(options, accepted, metric="accuracy", groups=None):
    questions = [question(*each) for each in zip(options, accepted, strict=True)]
    records = [
        {
            "gold": right[0],
            "group": None if groups is None else groups[number],
            "wanted_class": texts[right[0]],
            "classes": list(texts),
            "options": [{"text": text} for text in texts],
        }
        for number, (texts, right) in enumerate(zip(options, accepted, strict=True))
    ]
    return _choice_baselines(metric, questions, records)


def test_baselines_of_fixed_options():
    options = [("no", "yes")] * 4
    found = baselines(options, [(1,), (1,), (1,), (0,)])
    assert found == {"random": 0.5, "position": 0.75, "majority": 0.75}


def test_majority_has_no_meaning_where_options_differ():
    found = baselines([("a", "b"), ("c", "d", "e")], [(0,), (2,)])
    assert found["majority"] is None
    assert found["random"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_where_several_options_are_right_guessing_is_easier():
    found = baselines([("a", "b", "c", "d")] * 2, [(0, 1), (1,)])
    assert found == {"random": pytest.approx(3 / 8), "position": 1.0, "majority": 1.0}


def test_a_constant_guesser_is_caught_by_the_position_baseline():
    options = [(f"a{i}", f"b{i}") for i in range(9)]
    assert baselines(options, [(0,)] * 9)["position"] == 1


def test_guessing_answers_of_questions_by_hand():
    # Four answers of two questions, three of them true (option 1).
    options, accepted, groups = [("no", "yes")] * 4, [(1,), (1,), (1,), (0,)], [1, 1, 2, 2]
    found = baselines(options, accepted, "f1a", groups)
    # Evenly: 1.5 rightly, 2 found, 3 wanted. Always true: 3, 4 and 3.
    assert found["random"] == pytest.approx(3 / 5)
    assert found["position"] == pytest.approx(6 / 7)
    found = baselines(options, accepted, "question_em", groups)
    assert found["random"] == pytest.approx(1 / 4)
    assert found["position"] == found["majority"] == 1 / 2


def test_guessing_classes_by_hand():
    options = [("true", "false", "neither")] * 4
    found = baselines(options, [(0,), (0,), (0,), (1,)], "macro_f1")
    # Evenly, 4/3 of each class: 2 x 1 / (4/3 + 3), 2 x (1/3) / (4/3 + 1), 0.
    assert found["random"] == pytest.approx((6 / 13 + 2 / 7) / 3)
    # Always the first: 2 x 3 / (4 + 3), and nothing for two of three classes.
    assert found["position"] == found["majority"] == pytest.approx(6 / 7 / 3)


def test_guessing_a_free_class_or_every_token_alike():
    task = Task.model_validate({**TASK, "scorer": "generate", "answers": ["{a}"],
                                "metrics": ["em", "macro_f1", "perplexity"],
                                "classes": ["a", "b"]})  # fmt: skip
    records = [{"wanted_class": text, "found_class": "?", "classes": ["a", "b"],
                "uniform_nats": -math.log(10) * num}
               for text, num in (("a", 1), ("a", 2), ("b", 3))]  # fmt: skip
    assert chance(task, "macro_f1", [], records)["majority"] == pytest.approx(0.8 / 2)
    assert chance(task, "perplexity", [], records)["random"] == pytest.approx(100)


def majority(answers, metric, how, no_answer=None):
    """What the most common answer scores for questions with these accepted answers."""
    questions = [dataclasses.replace(question((), ()), references=each) for each in answers]
    task = Task.model_validate({**TASK, "scorer": "generate", "answers": ["{a}"],
                                "normalize": how, "no_answer": no_answer})  # fmt: skip
    return chance(task, metric, questions, [])["majority"]


def test_majority_answer_of_open_questions():
    answers = [("unanswerable",), ("unanswerable",), ("Paris", "paris"), ("Rome",)]
    assert majority(answers, "em", "squad") == 0.5
    found = majority(answers, "f1", "squad", no_answer="unanswerable")
    assert found == 0.5
    answers = [("CANNOTANSWER",), ("CANNOTANSWER",), ("in Rome",)]
    found = majority(answers, "f1", "squad_v1", no_answer="CANNOTANSWER")
    assert found == pytest.approx(2 / 3)


def test_of_answers_equally_many_accept_the_first_by_alphabet_is_given():
    # "north" overlaps with a third answer, "south" with none.
    answers = [("south", "north"), ("north pole",)]
    for first in (answers[0], answers[0][::-1]):
        found = majority([first, answers[1]], "f1", "squad")
        assert found == pytest.approx((1 + 2 / 3) / 2)
