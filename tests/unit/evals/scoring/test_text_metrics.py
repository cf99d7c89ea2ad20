"""Comparing texts, against worked examples of the official scripts' rules."""

import pytest

from glamcli.evals.asking.question import _by_majority
from glamcli.evals.scoring.text_metrics import (
    _exact_match,
    _token_f1,
    agreement,
    normalized,
    text_metric,
)


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        ("  The  Eiffel-Tower, a. ", "squad", "eiffeltower"),
        ("An answer: the U.S.", "squad", "answer us"),
        ("Gabriel,”", "words", "gabriel"),
        ("The a", "words", "the a"),
        (" As it is. ", "exact", "As it is."),
        ("Jean-Luc’s snake_case", "triviaqa", "jean luc s snake case"),
        ("The A-ha", "triviaqa", "ha"),  # once the hyphen is a blank, "a" is an article
        ("The A-ha", "squad", "aha"),
    ],
)
def test_normalisation(text, how, expected):
    assert normalized(text, how) == expected


def test_exact_match_takes_any_accepted_answer():
    assert _exact_match("the Normans.", ["Vikings", "Normans"]) == 1
    assert _exact_match("Norman", ["Vikings", "Normans"]) == 0


def test_any_alias_of_triviaqa_is_right_however_it_is_punctuated():
    aliases = ["Sunset Blvd", "West Sunset Boulevard", "Sunset Boulevard"]
    assert text_metric("em", "the Sunset-Boulevard!", aliases, "triviaqa") == 1
    assert text_metric("em", "the Sunset-Boulevard!", aliases, "squad") == 0
    assert text_metric("em", "Sunset", aliases, "triviaqa") == 0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("in the 10th century", ["10th and 11th centuries"], 2 / 7),
        ("France", ["France", "in France"], 1.0),
        ("b b c", ["b c c"], 2 / 3),
        ("", ["x"], 0.0),
        ("the", ["a"], 1.0),
    ],
)
def test_f1_by_hand(prediction, answers, expected):
    assert _token_f1(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        # Nothing can be partly right about "no answer".
        ("Unanswerable.", ["unanswerable"], 1, 1),
        ("it is unanswerable", ["unanswerable"], 0, 0),
        ("unanswerable", ["Rome"], 0, 0),
        ("in Rome", ["Rome", "Rome, Italy"], 0, 2 / 3),
        ("", ["unanswerable"], 1, 1),
    ],
)
def test_unanswerable_questions_are_right_or_wrong_as_in_squad_v2(prediction, answers, em, f1):
    rules = {"no_answer": "unanswerable"}
    assert text_metric("em", prediction, answers, "squad", **rules) == em
    assert text_metric("f1", prediction, answers, "squad", **rules) == pytest.approx(f1)


def test_leaving_each_reference_out_by_hand():
    # CoQA: f1("white cat") is 1 against "white cat", 2/3 against "white", 0 against "dog".
    # Left out in turn: max(2/3, 0), max(1, 0), max(1, 2/3); the mean is (2/3 + 1 + 1) / 3.
    answers = ["white cat", "white", "dog"]
    rules = {"references": "leave_one_out"}
    assert text_metric("f1", "a white cat", answers, "squad", **rules) == pytest.approx(8 / 9)
    # em: 0 (without the only match), 1, 1
    assert text_metric("em", "a white cat", answers, "squad", **rules) == pytest.approx(2 / 3)
    assert text_metric("f1", "a white cat", answers, "squad") == 1


def test_one_reference_is_never_left_out():
    assert text_metric("f1", "only", ["only"], "squad", references="leave_one_out") == 1


@pytest.mark.parametrize(
    ("prediction", "answers", "f1"),
    [
        ("CANNOTANSWER", ["CANNOTANSWER"], 1),
        ("cannotanswer", ["CANNOTANSWER"], 0),
        ("", ["CANNOTANSWER"], 0),
        ("the", ["a"], 0),  # no word is common
        ("in Rome", ["Rome"], 2 / 3),
    ],
)
def test_quac_wants_its_no_answer_to_the_letter_and_words_in_common(prediction, answers, f1):
    rules = {"references": "leave_one_out", "no_answer": "CANNOTANSWER"}
    assert text_metric("f1", prediction, answers, "squad_v1", **rules) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "answers", "em"),
    [
        ("the", ["A", "Rome"], 0),  # "A" has no word and does not count beside "Rome"
        ("Rome", ["A", "Rome"], 1),
        ("unanswerable", ["the"], 1),  # there are no others
        ("unanswerable", ["Unanswerable"], 0),  # a text of the passage
    ],
)
def test_squad_v2_drops_answers_without_words(prediction, answers, em):
    rules = {"no_answer": "unanswerable"}
    for name in ("em", "f1"):
        assert text_metric(name, prediction, answers, "squad", **rules) == em


def test_people_agree_as_far_as_their_answers_overlap():
    # QuAC: best F1 of each against the others: 2/3, 2/3 and 0.
    assert agreement(["in 1990", "1990", "never"]) == pytest.approx(4 / 9)
    assert agreement(["alone"]) == 1


def test_references_are_of_the_kind_that_half_of_them_are():
    no = "CANNOTANSWER"
    assert _by_majority(("x", no), no) == (no,)
    assert _by_majority(("x", no, "y"), no) == ("x", "y")
    assert _by_majority(("x",), no) == ("x",)
