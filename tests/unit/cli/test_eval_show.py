"""Tables of scores: everything that a reader needs to know what they mean."""

import dataclasses

import pytest

from glamcli.cli.eval_show import show_results
from glamcli.evals.results.scores import Average, Measured, Reported, Results, Score, Subset

BASE = {"random": 0.5, "position": None, "majority": 0.6}
GPT3 = (Reported("GPT-3", 60.5, False),)


def measured(metric="accuracy", value=0.5):
    return Measured(metric, value, 0.1, BASE, None, GPT3)


SCORE = Score(
    "a", 1, "1", (measured(), measured("perplexity", 12.5)), 40, 0.5, 20, 0, (), {}, (), ()
)


def shown(capsys, score=SCORE, averages=()):
    show_results(Results("s", {"step": 7}, (score,), (), averages=averages), as_json=False)
    return capsys.readouterr().out.splitlines()


def test_every_metric_has_a_row_with_error_baselines_and_published_scores(capsys):
    title, columns, accuracy, perplexity, *notes = shown(capsys)
    assert title == "suite s, step 7, percent"
    assert columns.split() == ["task", "shots", "metric", "score", "error", "random", "position",
                               "majority", "items", "fitted", "GPT-3"]  # fmt: skip
    assert accuracy.split() == ["a", "1", "accuracy", "50.0", "±", "10.0", "50.0", "-", "60.0",
                                "40", "0.5", "60.5?"]  # fmt: skip
    assert perplexity.split()[2:4] == ["perplexity", "12.50"]
    assert "published scores with `?` were not seen in the paper itself" in notes


def test_scores_by_the_values_of_a_field_have_a_table(capsys):
    subsets = (Subset("gender", "female", 16, (measured(value=0.75),)),)
    lines = shown(capsys, dataclasses.replace(SCORE, subsets=subsets))
    assert lines[-2].split()[:5] == ["task", "shots", "by", "value", "metric"]
    assert lines[-1].split() == ["a", "1", "gender", "female", "accuracy", "75.0", "±", "10.0",
                                 "50.0", "16"]  # fmt: skip


def test_cut_questions_ties_and_equal_options_are_counted(capsys):
    lines = shown(capsys, dataclasses.replace(SCORE, num_cut=40, num_tied=3, num_equal=2))
    assert lines[1].split()[-2:] == ["cut", "GPT-3"]
    assert lines[2].split()[-2:] == ["40", "60.5?"]
    notes = "\n".join(lines)
    assert "cut: items whose question lost its beginning" in notes
    assert "a at 1 shots: options tie exactly in 3 items: 1/k for each" in notes
    assert "a at 1 shots: 2 items have two equal options" in notes


@pytest.mark.parametrize(
    ("value", "missing", "cells"),
    [(4 / 9, (), ["44.4", "3 of 3"]), (2 / 3, ("x", "y"), ["66.7", "1 of 3"]),
     (None, ("x", "y", "z"), ["-", "0 of 3"])],
)  # fmt: skip
def test_averages_name_what_is_missing(capsys, value, missing, cells):
    text = "\n".join(shown(capsys, averages=(Average("all", "0", value, 3, missing, GPT3),)))
    row = next(line for line in text.splitlines() if line.startswith("all"))
    assert " ".join(cells) in " ".join(row.split())
    assert row.endswith("60.5?")
    assert ("missing: at 0 shots " + ", ".join(missing) in text) == bool(missing)
