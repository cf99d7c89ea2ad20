"""Mixture files: contradictions with their lines, and what a run sees of each source."""

import pytest

from glamcli.config.load import load_mixture, shipped
from glamcli.config.mixtures import source_weights, tokens_by_source
from glamcli.errors import RecipeError

TWO = "sources:\n  a: {kind: text, path: a.txt, weight: 3}\n  b: {kind: text, path: b, weight: 1}\n"


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(text):
        (tmp_path / "m.yaml").write_text(text)
        return load_mixture("./m.yaml")

    return read


@pytest.mark.parametrize("name", shipped("data_mixtures"))
def test_every_shipped_mixture_is_fine(name):
    assert load_mixture(name).about


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("about: x\n", "m.yaml:1: `sources` is missing"),
        ("sources: {}\n", "m.yaml:1: `sources` must be not empty, not a section"),
        (TWO.replace("3", "0").replace("1", "0"), "m.yaml:1: the weights of all sources are 0"),
        (TWO.replace("3", "-1"), "m.yaml:2: `sources.a.weight` must be at least 0, not `-1`"),
        (TWO.replace("3", ".nan"), "m.yaml:2: `sources.a.weight` must be a number"),
        (TWO.replace("path: b, ", ""), "m.yaml:3: source `b` is text, which needs a `path`"),
        (TWO.replace("path: b", "path: b, split: train"), "m.yaml:3: source `b` has a `split`"),
        (
            TWO.replace("path: b", "path: b, where: {x: 1}"),
            "m.yaml:3: source `b` has `where`, but text has no fields",
        ),
        (TWO.replace("b:", '"b\\n":'), "m.yaml:3: `b\\n` is not a name: it must be one line"),
        (TWO.replace("text", "txt"), "m.yaml:2: `sources.a.kind` must be"),
        (
            TWO + "stages:\n  - {from_step: 0, weights: {a: 1}}\n",
            "m.yaml:5: stages come in order",
        ),
        (
            TWO + "stages:\n  - {from_step: 9, weights: {a: 1}}\n  - from_step: 9\n"
            "    weights: {b: 1}\n",
            "m.yaml:6: stages come in order",
        ),
        (TWO + "stages:\n  - from_step: 9\n    weights:\n      c: 1\n", "m.yaml:7: no source is"),
        (TWO + "stages:\n  - from_step: 9\n    weights: {a: 0}\n", "m.yaml:6: the weights of this"),
        (TWO + "extends: glam\n", "m.yaml:4: unknown key `extends`"),
    ],
)
def test_a_mistake_in_a_mixture_is_placed(read, text, what):
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert what in caught.value.what


def test_weights_are_shares(read):
    assert source_weights(read(TWO)) == {"a": 0.75, "b": 0.25}


def test_tokens_follow_the_stages(read):
    text = (
        TWO
        + "stages:\n  - {from_step: 10, weights: {b: 2}}\n  - {from_step: 40, weights: {a: 1}}\n"
    )
    mixture = read(text)
    assert tokens_by_source(mixture, 30, 100) == {"a": 750, "b": 250 + 2000}
    assert tokens_by_source(mixture, 5, 100) == {"a": 375, "b": 125}
    assert sum(tokens_by_source(mixture, 50, 100).values()) == 5000


def test_the_paper_repeats_wikipedia_twelve_times():
    mixture = load_mixture("glam")
    seen = tokens_by_source(mixture, 600_000, 1_000_000)
    epochs = {name: seen[name] / (source.tokens or 1) for name, source in mixture.sources.items()}
    assert [round(value, 2) for value in epochs.values()] == [1.76, 12.0, 0.97, 0.05, 0.31, 0.02]
