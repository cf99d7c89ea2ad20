"""What stands beside a score: metrics of the whole, subsets, settings, and what could not be."""

import json
import math

import pytest

from glamcli.evals.run import evaluate
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Silent

PAIRS = """
data: {path: pairs.jsonl}
prompt: "{q}"
options: ["- [False] {a}", "- [True] {a}"]
label: right
group: "{g}"
by: [kind]
metrics: [f1a, question_em, accuracy, macro_f1]
shots: {few: 3, source: pool, data: {path: pool.jsonl}}
"""
ENTITIES = """
data: {path: entities.jsonl}
prompt: "{q}"
options: names
option_text: "{option} came."
right: right
metrics: [accuracy, f1]
scorer: sum
"""
TWINS = """
data: {path: twins.jsonl}
prompt: "{q}"
options: names
label: right
"""
WORD = """
data: {path: pairs.jsonl}
prompt: "{q}"
answers: ["{a}"]
scorer: generate
metrics: [em, f1, perplexity]
max_tokens: 2
beam: 1
"""


@pytest.fixture(scope="module")
def results(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    pairs = [
        {"q": f"Q{i // 2}", "g": i // 2, "a": f"w{i}", "right": i % 2, "kind": i % 2 == 1}
        for i in range(6)
    ]
    names = [{"q": "Who?", "names": ["Ann", "Bo", "Cy"], "right": ["Bo", f"x{i}"]} for i in "abc"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    (folder / "entities.jsonl").write_text("".join(json.dumps(each) + "\n" for each in names))
    (folder / "pairs.yaml").write_text(PAIRS)
    (folder / "entities.yaml").write_text(ENTITIES)
    (folder / "word.yaml").write_text(WORD)
    twins = [{"q": f"Q{i}:", "names": ["Ann", "Ann"], "right": i % 2} for i in range(3)]
    (folder / "twins.jsonl").write_text("".join(json.dumps(each) + "\n" for each in twins))
    (folder / "twins.yaml").write_text(TWINS)
    (folder / "suite.yaml").write_text("tasks: [pairs, entities, word, twins]\nshots: [0, few]\n")
    return evaluate(subject, load_suite(str(folder / "suite.yaml")), progress=Silent())


def test_metrics_of_the_whole_come_from_the_items(results):
    pairs, entities, word, _ = results.scores
    right = [item["accuracy"] for item in pairs.items]
    values = {each.metric: each for each in pairs.measured}
    assert values["accuracy"].value == pytest.approx(sum(right) / 6)
    by_question = [right[i] and right[i + 1] for i in (0, 2, 4)]
    assert values["question_em"].value == pytest.approx(sum(by_question) / 3)
    assert values["f1a"].interval is not None
    assert values["accuracy"].interval is None
    chosen = [item["chosen"] for item in entities.items]
    assert entities.measured[0].value == pytest.approx(chosen.count(1) / 3)
    nats = [item["answer_nats"] for item in word.items]
    perplexity = word.measured[2]
    assert perplexity.metric == "perplexity"
    assert perplexity.value == pytest.approx(math.exp(-sum(nats) / len(nats)))


def test_equal_options_tie_and_are_counted(results):
    twins = results.scores[3]
    assert [item["accuracy"] for item in twins.items] == [0.5] * 3
    assert twins.measured[0].value == 0.5
    assert (twins.num_equal, twins.num_tied) == (3, 3)
    assert results.scores[1].num_equal == 0


def test_guessing_is_told_for_metrics_of_the_whole(results):
    pairs, _, word, _ = results.scores
    base = {each.metric: each.baselines for each in pairs.measured}
    # Three pairs of a wrong and a right answer: evenly 1.5 rightly of 3 found and 3 wanted.
    assert base["f1a"]["random"] == pytest.approx(0.5)
    assert base["question_em"]["random"] == pytest.approx(0.25)
    assert base["macro_f1"]["random"] is not None
    tokens = len(" w0")
    assert word.measured[2].baselines["random"] == pytest.approx(259**tokens)


def test_scores_are_told_by_the_values_of_a_field(results):
    subsets = results.scores[0].subsets
    assert [(each.field, each.value, each.num_items) for each in subsets] == [
        ("kind", "False", 3),
        ("kind", "True", 3),
    ]
    whole = results.scores[0].measured[2].value
    assert sum(each.measured[2].value for each in subsets) / 2 == pytest.approx(whole)


def test_a_missing_pool_costs_the_shots_and_not_the_zero_shot_score(results):
    assert [(each.task, each.setting) for each in results.scores] == [
        ("pairs", "0"),
        ("entities", "0"),
        ("word", "0"),
        ("twins", "0"),
    ]
    told = {(each.task, each.setting): each.error.what for each in results.failures}
    assert "pool.jsonl" in told["pairs", "few"]
    assert "what `few` means" in told["entities", "few"]


def test_conditions_name_the_items_the_preset_and_the_limit(results):
    conditions = results.scores[0].conditions
    assert len(conditions["items_sha256"]) == 64
    assert conditions["preset"] == "glam"
    assert conditions["limit"] is None
    assert conditions["items_from"].endswith("pairs.jsonl:1")
