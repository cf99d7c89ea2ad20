import dataclasses
import json
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from glamcli.errors import RecipeError
from glamcli.evals.results.journal import Journal
from glamcli.evals.results.store import keep_results
from glamcli.evals.run import evaluate
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Silent

CHOICE = """
data: {path: choice.jsonl}
prompt: "{q}"
options: options
label: label
scorer: %s
shots: {separator: "\\n"}
"""
OPEN = """
data: {path: open.jsonl}
prompt: "{q}"
answers: answers
scorer: generate
metrics: [em, f1]
max_tokens: 4
beam: 2
"""


@pytest.fixture
def suite(tmp_path):
    """A suite of three good tasks and three bad ones."""
    choice = [
        {"q": f"Number {i} is", "options": ["even", "odd number"], "label": i % 2} for i in range(9)
    ]
    free = [{"q": f"Say {i}", "answers": [str(i), "x"]} for i in range(5)]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(each) + "\n" for each in choice))
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(each) + "\n" for each in free))
    (tmp_path / "wrong.jsonl").write_text('{"q": "a", "options": ["b", "c"], "label": 5}\n')
    (tmp_path / "choice.yaml").write_text(CHOICE % "per_token")
    (tmp_path / "uncond.yaml").write_text(CHOICE % "uncond")
    (tmp_path / "open.yaml").write_text(OPEN)
    (tmp_path / "nodata.yaml").write_text((CHOICE % "sum").replace("choice.jsonl", "gone.jsonl"))
    (tmp_path / "label.yaml").write_text((CHOICE % "sum").replace("choice.jsonl", "wrong.jsonl"))
    (tmp_path / "typo.yaml").write_text((CHOICE % "sum").replace("prompt", "promt"))
    names = "[typo, choice, nodata, label, uncond, open]"
    (tmp_path / "suite.yaml").write_text(f"tasks: {names}\nshots: [0, 2]\n")
    return load_suite(str(tmp_path / "suite.yaml"))


@pytest.fixture
def results(subject, suite):
    return evaluate(subject, suite, progress=Silent())


def test_bad_tasks_are_reported_with_their_place_and_the_others_run(results):
    assert [(s.task, s.shots) for s in results.scores] == [
        (task, shots) for task in ("choice", "uncond", "open") for shots in (0, 2)
    ]
    reasons = {failure.task: failure.error.what for failure in results.failures}
    assert "typo.yaml:3" in reasons["typo"]
    assert "gone.jsonl" in reasons["nodata"]
    assert "wrong.jsonl:1: `label` is 5, with 2 options" in reasons["label"]
    assert set(reasons) == {"typo", "nodata", "label"}


def test_a_score_carries_what_it_means(results):
    score = results.scores[1]
    assert score.num_items == 9
    assert score.shots_fitted == 2
    assert score.conditions["scorer"] == "per_token"
    assert score.conditions["dispatch"] == "dropless"
    assert score.conditions["bos"] is True
    for name in ("task_sha256", "suite_sha256", "prompts_sha256"):
        assert len(score.conditions[name]) == 64
    (accuracy,) = score.measured
    assert accuracy.value == sum(item["accuracy"] for item in score.items) / 9
    assert accuracy.baselines == {"random": 0.5, "position": 5 / 9, "majority": 5 / 9}
    assert results.model["step"] == 7
    assert results.model["dtype"] == "float32"


def test_the_scorer_decides_by_its_own_rule(results):
    for score in results.scores:
        for item in score.items if score.task != "open" else ():
            ranked = [option["score"] for option in item["options"]]
            assert item["chosen"] == ranked.index(max(ranked))
            for option in item["options"]:
                wanted = (
                    option["nats"] / option["tokens"]
                    if score.task == "choice"
                    else option["nats"] - option["uncond_nats"]
                )
                assert option["score"] == pytest.approx(wanted)


def test_results_are_the_same_again_and_change_with_the_seed(subject, suite, results):
    again = evaluate(subject, suite, progress=Silent())
    assert again.to_json() == results.to_json()
    other = evaluate(subject, suite, shots=[2], seed=1, progress=Silent())
    changed = other.scores[0].conditions["prompts_sha256"]
    assert changed != results.scores[1].conditions["prompts_sha256"]


class Stopped(Silent):
    """Ctrl-C after so many advances."""

    def __init__(self, count):
        self.left = count

    @contextmanager
    def phase(self, *args):
        yield self

    def note(self, text):
        pass

    def advance(self, units=1):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_evaluation_ends_with_identical_results(subject, suite, tmp_path):
    results = evaluate(subject, suite, progress=Silent())

    def start():
        return Journal.open(tmp_path / "eval", {"step": 7})

    with pytest.raises(KeyboardInterrupt):
        evaluate(subject, suite, progress=Stopped(4), journal=start())
    again = start()
    assert 0 < len(again.known) < 20
    found = evaluate(subject, suite, progress=Silent(), journal=again)
    assert found.to_json() == results.to_json()
    assert [score.items for score in found.scores] == [score.items for score in results.scores]
    # A third one finds everything, and computes nothing.
    bad = jax.tree.map(lambda x: x * np.float32("nan"), subject.params)
    last = dataclasses.replace(subject, params=bad)
    assert evaluate(last, suite, progress=Silent(), journal=start()).scores == found.scores


def test_a_limit_takes_the_first_items_with_the_same_prompts(subject, suite, results):
    few = evaluate(subject, suite, shots=[2], limit=3, progress=Silent())
    whole = results.scores[1]
    digests = [item["prompt_sha256"] for item in few.scores[0].items]
    assert digests == [item["prompt_sha256"] for item in whole.items[:3]]


def test_results_on_disk_hold_scores_and_items(results, tmp_path):
    summary = keep_results(results, tmp_path, Silent())
    assert summary is not None
    items = summary.with_name("suite-step7.items.jsonl")
    assert summary.name == "suite-step7.json"
    read = json.loads(summary.read_text())
    assert len(read["scores"]) == 6
    assert len(read["failures"]) == 3
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    assert len(lines) == 2 * (9 + 9 + 5)


def with_window(trained, tokens):
    batch = trained.recipe.batch.model_copy(update={"row_tokens": tokens})
    recipe = trained.recipe.model_copy(update={"batch": batch})
    return dataclasses.replace(trained, recipe=recipe)


def test_a_window_too_short_for_the_shots_drops_them_and_says_so(subject, tmp_path, suite):
    choice = load_suite(str(tmp_path / "choice.yaml"))
    small = with_window(subject, 46)
    (score,) = evaluate(small, choice, shots=[2], progress=Silent()).scores
    assert score.shots_fitted == 1
    tiny = with_window(subject, 8)
    (failure,) = evaluate(tiny, choice, shots=[0], progress=Silent()).failures
    assert "longer than the window" in failure.error.what


def test_too_many_shots_fail_only_that_number(subject, suite):
    found = evaluate(subject, suite, shots=[0, 9], progress=Silent())
    assert {(s.task, s.shots) for s in found.scores} == {
        ("choice", 0),
        ("uncond", 0),
        ("open", 0),
    }
    assert {(f.task, f.setting) for f in found.failures if f.setting is not None} == {
        ("choice", "9"),
        ("uncond", "9"),
        ("open", "9"),
    }


def test_an_explanation_shows_what_was_scored(subject, suite, results):
    found = evaluate(subject, suite, shots=[2], explain=("choice", 4), progress=Silent())
    (told,) = found.explanations
    item = results.scores[1].items[4]
    assert told.place == item["place"]
    assert told.scored[0].context.endswith("Number 4 is")
    assert told.scored[0].context.count("\n") == 2
    assert [each.text for each in told.scored] == [" even", " odd number"]
    for scored, option in zip(told.scored, item["options"], strict=True):
        assert "".join(piece for piece, _ in scored.tokens) == scored.text
        assert sum(nats for _, nats in scored.tokens) == pytest.approx(option["nats"], rel=1e-4)
    assert told.wanted == ("even",)


def test_a_generated_answer_is_explained(subject, suite):
    found = evaluate(subject, suite, shots=[1], explain=("open", 0), progress=Silent())
    (told,) = found.explanations
    assert told.scored[0].context.endswith("Say 0")
    assert told.wanted == ("0", "x")
    assert set(told.correct) == {"em", "f1"}


@pytest.mark.parametrize("explain", [("nothing", 0), (None, 0)])
def test_explaining_a_task_that_is_not_there_is_refused(subject, suite, explain):
    with pytest.raises(RecipeError) as caught:
        evaluate(subject, suite, explain=explain, progress=Silent())
    assert "`choice`" in (caught.value.hint or "")


def test_explaining_an_item_that_is_not_there_is_refused(subject, suite):
    found = evaluate(subject, suite, shots=[0], explain=("choice", 99), progress=Silent())
    assert "items 0 to 8" in found.failures[0].error.what


def test_the_quick_suite_needs_a_run(subject):
    bare = dataclasses.replace(subject, documents=None)
    found = evaluate(bare, load_suite("quick"), shots=[0], progress=Silent())
    assert len(found.failures) == 3
    assert "held-out documents" in found.failures[0].error.what
