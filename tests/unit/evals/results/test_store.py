"""Results are read back as they were written, found by run folder, averaged and compared."""

import dataclasses
import json

import pytest

from glamcli.errors import DataError, RecipeError
from glamcli.evals.results.compare import compare
from glamcli.evals.results.scores import Failure, Measured, Reported, Results, Score, Subset
from glamcli.evals.results.store import (
    find_results,
    keep_analysis,
    keep_results,
    load_results,
)
from glamcli.evals.scoring.totals import averages
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Silent

CONDITIONS = {"scorer": "sum", "dispatch": "dropless", "dtype": "float32", "seed": 0, "window": 64}
BASE = {"random": 0.5, "position": None, "majority": 0.6}


def score(task="a", setting="0", right=(1, 0, 1), metric="accuracy", prompt="p", **conditions):
    """A task whose items were right or wrong."""
    shots = int(setting)
    items = tuple(
        {"task": task, "setting": setting, "key": f"k{number}", metric: float(value),
         "shots_fitted": shots, "prompt_sha256": f"{prompt}{number}", "place": f"f:{number}"}
        for number, value in enumerate(right)
    )  # fmt: skip
    others = (Reported("GPT-3", 60.5, False),)
    measured = Measured(metric, sum(right) / len(right), 0.1, BASE, (0.1, 0.9), others)
    subset = Subset("kind", "x", 1, (measured,))
    given = {**CONDITIONS, **conditions}
    return Score(task, shots, setting, (measured,), len(right), shots, 0, 0, ("why",), given,
                 (subset,), items)  # fmt: skip


def results(*scores, suite="s", step=3, **model):
    failures = (Failure("z", None, RecipeError("no such thing", "make one")),)
    return Results(suite, {"step": step, "tokenizer": "t", **model}, scores, failures)


def write(found, run):
    """The files of results in a run folder."""
    summary = keep_results(found, run, Silent())
    assert summary is not None
    return summary, summary.with_name(f"{summary.stem}.items.jsonl")


def compared(first, second):
    return compare(results(first), results(second))


def test_what_is_written_is_read_back(tmp_path):
    wrote = results(score(), score("b", "1"))
    summary, _ = write(wrote, tmp_path)
    read = load_results(summary)
    assert read.to_json() == wrote.to_json()
    assert read.failures[0].error.hint == "make one"
    assert load_results(summary, with_items=True).scores == wrote.scores


def test_a_run_folder_means_its_newest_results_of_a_suite(tmp_path):
    for step in (9, 10):
        newest, _ = write(results(score(), step=step), tmp_path)
    assert find_results(tmp_path) == newest
    write(results(score(), suite="other"), tmp_path)
    with pytest.raises(RecipeError, match="several results: `other`, `s`"):
        find_results(tmp_path)
    assert find_results(tmp_path, "s") == newest
    with pytest.raises(RecipeError, match="no results of `x`"):
        find_results(tmp_path, "x")


def test_evaluations_that_differ_have_files_of_their_own_whose_names_say_how(tmp_path):
    changes: list[dict] = [
        {}, {"shots": ("0",)}, {"shots": ("0", "few")}, {"preset": "gpt3"}, {"limit": 5},
        {"seed": 1}, {"seed": 1, "limit": 5},
    ]  # fmt: skip
    names = [
        write(dataclasses.replace(results(score()), **each), tmp_path)[0].name for each in changes
    ]
    assert names == [
        "s-step3.json", "s-shots0-step3.json", "s-shots0,few-step3.json", "s-gpt3-step3.json",
        "s-limit5-step3.json", "s-seed1-step3.json", "s-limit5-seed1-step3.json",
    ]  # fmt: skip
    einsum, _ = write(results(score(), dispatch="einsum"), tmp_path)
    assert einsum.name == "s-einsum-step3.json"


def test_what_the_name_does_not_say_is_counted_and_the_same_replaced(tmp_path):
    first = score(task_sha256="1", stop=("x",), items_from="here")
    elsewhere = score(task_sha256="1", stop=("x",), items_from="there")
    summary, _ = write(results(first), tmp_path)
    assert write(results(elsewhere, score("b")), tmp_path)[0] == summary
    other, items = write(results(score(task_sha256="2")), tmp_path)
    assert (other.name, items.name) == ("s-step3-2.json", "s-step3-2.items.jsonl")
    fewer, _ = write(results(first), tmp_path)  # would lose the score of `b`
    assert fewer.name == "s-step3-3.json"
    assert [each.task for each in load_results(summary).scores] == ["a", "b"]
    assert find_results(tmp_path) == fewer
    write(results(score(), step=2), tmp_path)
    assert find_results(tmp_path) == fewer


def test_only_the_same_weights_replace_results(tmp_path):
    first, _ = write(results(score(), params_digest="1" * 64), tmp_path)
    other, _ = write(results(score(), params_digest="2" * 64), tmp_path)
    assert (first.name, other.name) == ("s-step3.json", "s-step3-2.json")
    assert load_results(first).model["params_digest"] == "1" * 64
    assert write(results(score(), params_digest="2" * 64), tmp_path)[0] == other
    for digest in "121":
        content = {"asked": "a", "params_digest": digest}
        keep_analysis(content, tmp_path, "analysis", Silent())
    assert {
        path.name: json.loads(path.read_text())["params_digest"]
        for path in tmp_path.glob("analysis*")
    } == {"analysis.json": "1", "analysis-2.json": "2"}


def test_results_that_differ_only_in_the_digest_of_their_weights_are_compared(tmp_path):
    mine, other = (results(score(), params_digest=each * 64) for each in "12")
    assert compare(mine, other) == compare(mine, mine)


def test_damaged_items_are_refused_with_the_line(tmp_path):
    summary, items = write(results(score()), tmp_path)
    items.write_text(items.read_text() + '{"task": "a"}\n')
    with pytest.raises(DataError, match=r"s-step3\.items\.jsonl:4: not the record of an item"):
        load_results(summary, with_items=True)
    content = json.loads(summary.read_text())
    summary.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(DataError, match="newer version"):
        load_results(summary)


def test_wins_losses_and_the_sign_test():
    first, second = score(right=[1] * 2 + [0] * 8), score(right=[0, 1] + [1] * 6 + [0] * 2)
    (found,) = compared(first, second).paired
    assert (found.first_wins, found.second_wins, found.ties) == (1, 6, 3)
    assert found.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # two tails of 7 fair coins
    assert (found.first, found.second) == (0.2, 0.7)


def test_equal_results_differ_by_nothing():
    (found,) = compared(score(), score()).paired
    assert (found.first_wins, found.second_wins, found.ties, found.p_value) == (0, 0, 3, 1.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scorer": "per_token"}, "`scorer` is `sum` in the first and `per_token` in the second"),
        ({"dispatch": "einsum"}, "`dispatch` is `dropless`"),
        ({"stop": ["x"]}, "`stop` is not set in the first"),
        ({"prompt": "q"}, "text of the prompts differs, for example for f:0"),
    ],
)
def test_apples_and_oranges_are_refused_by_the_name_of_the_difference(change, reason):
    told = compared(score(), score(**change))
    assert not told.paired
    (refused,) = told.refused
    assert reason in refused.reason


def test_what_does_not_change_the_meaning_is_told_and_compared():
    told = compared(score(), score(right=(1, 1), dtype="bfloat16", seed=4, limit=2))
    (found,) = told.paired  # without demonstrations the seed draws nothing
    assert (found.second_wins, found.ties) == (1, 1)
    assert "`dtype` differs: `float32` and `bfloat16`" in told.notes
    assert "a at 0 shots: 1 items are in one of them only and left out" in told.notes
    assert compared(score("a", "1"), score("a", "1", seed=4)).refused


def test_averages_count_entries_alike_and_name_what_is_missing(tmp_path):
    (tmp_path / "suite.yaml").write_text(
        "tasks: [piqa, copa, rte]\nshots: [0, 1]\n"
        "averages: {both: [piqa, copa], rest: [rte/accuracy]}\noverall: [both, rest]\n"
        "published: [{model: GPT-3, of: overall, zero: 50.5}]\n"
    )
    suite = load_suite(str(tmp_path / "suite.yaml"))
    scores = [score("piqa"), score("copa", right=(0, 0)), score("rte", "1"), score("rte")]
    found, rule = averages(suite.settings, scores, ["0", "1"])
    values = {(each.name, each.setting): each.value for each in found}
    assert values["both", "0"] == pytest.approx(1 / 3)
    assert values["overall", "0"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert values["both", "1"] is None
    assert values["overall", "1"] == pytest.approx(2 / 3)  # of one of three entries
    assert "overall: over the 3 entries of both and rest" in rule


def test_squad_counts_twice_and_the_rule_says_so():
    _, words = averages(load_suite("glam29").settings, [], [])
    assert "squad_v2 counts 2 times, by em and f1" in words
    assert "overall: over the 30 entries of NLG and NLU" in words
