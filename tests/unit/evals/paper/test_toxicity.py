import json
import math
import shlex
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from glamcli.errors import DataError, GlamError, RecipeError
from glamcli.evals.paper.continuations import Draws, _resumed
from glamcli.evals.paper.cooccurrence import (
    _compare_terms,
    _TermGroup,
    load_terms,
)
from glamcli.evals.paper.toxicity import (
    _make_buckets,
    _score_texts,
    _ToxicityPrompt,
    make_scorer,
    read_prompts,
)
from glamcli.progress import Silent

SCORER = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"score": min(1, json.loads(line)["text"].count("bad") / 2)}))
"""


def command(tmp_path, text):
    path = tmp_path / "scorer.py"
    path.write_text(text)
    return make_scorer(f"{shlex.quote(sys.executable)} {shlex.quote(str(path))}", None)


def test_a_command_scores_every_text_that_is_not_empty(tmp_path):
    texts = [["bad\nbad", "  "], ["", "a bad Ü"]]
    assert _score_texts(texts, command(tmp_path, SCORER)) == [[1, 0], [0, 0.5]]
    assert _score_texts([["", " "]], make_scorer("no such program", None)) == [[0, 0]]
    judge = command(tmp_path, 'print(\'{"score": 0.5, "text": "a\\u2028b\\x85"}\')')
    assert judge(["a\u2028b\x85"]) == [0.5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import sys; sys.exit('no model')", "exited with 1: no model"),
        ("print(0.5)", "wrote 1 lines for 2 texts"),
        ("print(0.5); print(7)", "line 2 .* is not a score from 0 to 1: 7"),
        ("print(0.5); print('oops')", "line 2 .*: oops"),
        ("print(0.5); print('NaN')", "line 2 .*: NaN"),
    ],
)
def test_a_command_that_goes_wrong_is_told(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason):
        command(tmp_path, text)(["a", "b"])
    with pytest.raises(RecipeError, match="cannot run the scorer"):
        make_scorer("/no/such/program", None)(["a"])


def test_one_scorer_has_to_be_given(tmp_path):
    assert callable(make_scorer("cat", None))
    for given in ((None, None), ("cat", tmp_path / "c.json")):
        with pytest.raises(RecipeError, match="one of `--scorer` and `--classifier`"):
            make_scorer(*given)


def test_a_classifier_is_logistic_over_distinct_words(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"bias": -1, "weights": {"bad": 2, "good": -1}}')
    judge = make_scorer(None, path)
    assert judge(["Bad, bad!", "good bad", "x"]) == pytest.approx(
        [1 / (1 + math.exp(-1)), 0.5, 1 / (1 + math.e)]
    )
    path.write_text('{"bias": -2000, "weights": {}}')
    assert make_scorer(None, path)(["x"]) == [0.0]
    for content in (
        "{",
        "[]",
        '{"bias": 0}',
        '{"bias": "x", "weights": {}}',
        '{"bias": NaN, "weights": {}}',
    ):
        path.write_text(content)
        with pytest.raises(GlamError, match=r"c\.json"):
            make_scorer(None, path)


def test_buckets_tell_expected_maximum_and_probability():
    asked = [_ToxicityPrompt("a", 0.05), _ToxicityPrompt("b", 0.95), _ToxicityPrompt("c", 1.0),
             _ToxicityPrompt("d", None)]  # fmt: skip
    found = {
        each.name: each for each in _make_buckets(asked, [[0, 0.2], [0.5, 0.1], [0.9, 0.3], [0, 0]])
    }
    assert list(found) == ["all", "below 0.5", "from 0.5", "0.0 to 0.1", "0.9 to 1.0"]
    assert found["all"].num_prompts == 4
    assert found["all"].expected_max == pytest.approx((0.2 + 0.5 + 0.9 + 0) / 4)
    assert found["all"].probability == 0.5
    high = found["0.9 to 1.0"]
    assert (high.num_prompts, high.prompt_toxicity, high.probability) == (2, 0.975, 1)
    assert high.mean == pytest.approx(0.45)


def test_prompts_are_read_in_the_datasets_field_names(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": {"text": "So", "toxicity": 0.3}, "continuation": {"text": "x"}}\n'
        '{"prompt": {"text": "Or", "toxicity": null}}\n'
    )
    assert read_prompts(path) == [_ToxicityPrompt("So", 0.3), _ToxicityPrompt("Or", None)]
    assert len(read_prompts(path, 1)) == 1
    for line, reason in (
        ('{"prompt": "So"}', "2: no text"),
        ('{"prompt": {"text": "a", "toxicity": 3}}', "2: `prompt"),
    ):
        path.write_text('{"prompt": {"text": "So"}}\n' + line)
        with pytest.raises(DataError, match=rf"p\.jsonl:{reason}"):
            read_prompts(path)


def test_words_are_compared_within_a_group():
    _, known = load_terms()
    group = _TermGroup(prompts=("{term} was very",), terms=("He", "She"))
    texts = {"He": ["tall and strong"] * 3 + ["tall"], "She": ["tall, Tall, slowly"] * 3 + ["the"]}
    he, she = _compare_terms("gender", group, texts, known)
    assert dict(he.counts) == {"tall": 4, "strong": 3}
    assert dict(she.counts) == {"slowly": 3, "tall": 3}
    assert he.distinctive[0] == ("strong", 2.0)
    assert she.distinctive[0] == ("slowly", 2.0)
    assert dict(he.distinctive)["tall"] == pytest.approx(1 / (7 / 8))


@pytest.mark.parametrize(
    ("word", "counts"),
    [("kind", True), ("joyous", True), ("hopefully", True), ("family", False), ("house", False),
     ("fly", False), ("ran", False)],
)  # fmt: skip
def test_the_rule_for_adjectives_and_adverbs(word, counts):
    group = _TermGroup(prompts=("{term}",), terms=("a", "b"))
    found, _ = _compare_terms("g", group, {"a": [word], "b": []}, load_terms()[1])
    assert (word in found.counts) is counts


def test_the_shipped_terms_are_those_of_the_paper(tmp_path):
    groups = load_terms()[0].groups
    assert set(groups) == {"gender", "religion", "race"}
    assert "She" in groups["gender"].terms
    assert "{term} was very" in groups["gender"].prompts
    (tmp_path / "t.yaml").write_text("groups: {a: {prompts: ['{term'], terms: [x, y]}}\n")
    with pytest.raises(RecipeError, match=r"t\.yaml:1"):
        load_terms(tmp_path / "t.yaml")
    (tmp_path / "t.yaml").write_text("groups: {a: {prompts: ['{term}'], terms: [x]}}\n")
    with pytest.raises(RecipeError, match="two terms"):
        load_terms(tmp_path / "t.yaml")


def test_continuations_that_are_kept_are_not_made_again(tmp_path):
    path = tmp_path / "texts.jsonl"

    def run(asked, settings=1):
        sampled, advanced = [], []

        def sample(prompt):
            sampled.append(prompt)
            return [f"{prompt} {number}" for number in range(3)]

        found = _resumed(asked, sample, path, {"samples": settings}, advanced.append)
        assert len(advanced) == len(asked)
        return found, sampled

    asked = ["He was", "She was"]
    first, sampled = run(asked)
    assert sampled == asked
    assert run(asked) == (first, [])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:9])  # killed while it wrote
    assert run(asked) == (first, ["She was"])
    kept = json.loads(lines[1])
    path.write_text(lines[0] + json.dumps({**kept, "texts": ["x", "y", "z"]}) + "\n")
    assert run(asked) == ([["x", "y", "z"], first[1]], ["She was"])
    assert run(asked, settings=2)[1] == asked


def test_continuations_of_other_weights_have_a_file_of_their_own(tmp_path):
    def sampled(weight):
        trained = SimpleNamespace(
            params={"w": np.float32(weight)}, tokenizer=SimpleNamespace(fingerprint="t"),
            identity={"step": 3}, run_dir=tmp_path,
            generator=SimpleNamespace(texts=lambda prompt, *_, **__: [f"{prompt} {weight}"]),
        )  # fmt: skip
        return Draws(1, 4).continuations(cast(Any, trained), "bias", ["He"], Silent())[0]

    (tmp_path / "bias").mkdir()
    assert sampled(1) == [["He 1"]]
    (first,) = (tmp_path / "bias").iterdir()
    kept = first.read_bytes()
    assert sampled(2) == [["He 2"]]
    assert first.read_bytes() == kept
    assert len(list((tmp_path / "bias").iterdir())) == 2


def test_an_empty_prompt_is_continued_as_well(tmp_path):
    for path in (None, tmp_path / "texts.jsonl"):
        assert _resumed(["", "a"], lambda prompt: [prompt + "x"], path, {}, lambda _: None) == [
            ["x"],
            ["ax"],
        ]


def test_kept_continuations_may_hold_any_line_separator(tmp_path):
    path, texts = tmp_path / "texts.jsonl", ["a\u2028b\x85c\u2029"]
    for made in (texts, ["another"]):
        found = _resumed(["x"], lambda prompt, made=made: made, path, {}, lambda _: None)
        assert found == [texts]
