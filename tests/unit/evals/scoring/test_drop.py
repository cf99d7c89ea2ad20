"""DROP's answers, worked by hand from the rules of its official script."""

import pytest

from glamcli.evals.asking.question import _spans
from glamcli.evals.scoring.text_metrics import normalized, text_metric


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The 4 yards", "4.0 yards"),
        ("4.5", "4.5"),
        ("1,200 men", "1200.0 men"),
        ("51-yard", "51.0 yard"),
        ("a touchdown!", "touchdown"),
        ("the", ""),
    ],
)
def test_numbers_are_floats_and_hyphens_part_words(text, expected):
    assert normalized(text, "drop") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"number": "12", "spans": [], "date": {}}, ("12",)),
        ({"number": "", "spans": ["Tom Brady", "Moss"], "date": {}}, ("Tom Brady", "Moss")),
        ({"number": "", "spans": [], "date": {"day": "", "month": "May", "year": "1920"}},
         ("May 1920",)),
        ({"number": "", "spans": [], "date": {"day": "", "month": "", "year": ""}}, ()),
        ({"number": 3}, ("3",)),
    ],
)  # fmt: skip
def test_an_answer_is_a_number_spans_or_a_date(answer, expected):
    assert _spans(answer, "d:1") == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "f1"),
    [
        ("12 yards", ("12",), 0, 0.67),  # bags {12.0, yards} and {12.0}: 2/3, rounded
        ("12.0", ("12",), 1, 1.0),
        ("13 yards", ("12 yards",), 0, 0.0),  # the accepted number is not in it
        ("yards", ("12 yards",), 0, 0.0),
        ("12 yards", ("yards",), 0, 0.67),  # no number wanted: words decide
        ("Tom Tom Brady", ("Tom Brady",), 0, 1.0),  # bags are sets, but the text differs
        # Two spans wanted, one given: its F1 counts half.
        ("Brady", ("Brady", "Moss"), 0, 0.5),
        (("Moss", "Brady"), ("Brady", "Moss"), 1, 1.0),
        # Matched one to one: "a b" can only stand for one of both.
        (("x y", "z"), ("x", "y"), 0, 0.33),
        ("", ("x",), 0, 0.0),
    ],
)
def test_spans_are_matched_one_to_one(prediction, answer, em, f1):
    assert text_metric("em", prediction, [answer], "drop") == em
    assert text_metric("f1", prediction, [answer], "drop") == pytest.approx(f1)


def test_the_matching_is_the_best_one_and_not_the_first():
    # The first span is nearest to the first, but the second fits nothing else.
    found, wanted = ("x", "x y"), ("x y z", "x")
    assert text_metric("f1", found, [wanted], "drop") == pytest.approx(round((1 + 0.8) / 2, 2))


def test_any_annotation_may_be_met():
    answers = [("4",), ("four", "4")]
    assert text_metric("f1", "4", answers, "drop") == 1
    assert text_metric("f1", "four", answers, "drop") == 0.5
