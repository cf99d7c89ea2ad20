import itertools
import json
from pathlib import Path

import pytest

from glamcli.config.mixtures import load_mixture
from glamcli.data.mixture import Schedule
from glamcli.errors import DataError, RecipeError

ROWS = {"a": 4, "b": 6, "empty": 0}


def test_order_of_sources_in_the_mixture_file_does_not_matter():
    one = Schedule(0, [(0, {"a": 1, "b": 1})], {"a": 4, "b": 6})
    two = Schedule(0, [(0, {"b": 1, "a": 1})], {"b": 6, "a": 4})
    assert [one.locate(k) for k in range(40)] == [two.locate(k) for k in range(40)]


def test_rows_of_a_source_are_spread_evenly():
    run = Schedule(0, [(0, {"a": 1, "b": 9})], {"a": 4, "b": 6})
    at = [k for k in range(200) if run.locate(k).source == "a"]
    gaps = {later - earlier for earlier, later in itertools.pairwise(at)}
    assert gaps == {10}


def test_a_source_without_weight_never_appears():
    run = Schedule(0, [(0, {"a": 1, "b": 0})], ROWS)
    assert {run.locate(k).source for k in range(100)} == {"a"}
    assert run.epochs(100) == {"a": 25.0, "b": 0.0, "empty": 0.0}


def test_stages_change_the_weights_from_their_first_row():
    run = Schedule(0, [(0, {"a": 1}), (10, {"b": 3}), (20, {"a": 0.5, "b": 0.5})], ROWS)
    assert run.counts(0, 10) == {"a": 10, "b": 0, "empty": 0}
    assert run.counts(10, 20) == {"a": 0, "b": 10, "empty": 0}
    assert run.counts(5, 25)["a"] + run.counts(5, 25)["b"] == 20


def test_history_ignores_the_future_and_sees_the_past():
    rows = {"a": 4, "b": 6}
    run = Schedule(0, [(0, {"a": 1})], rows)
    edited = Schedule(0, [(0, {"a": 0.5, "b": 0}), (100, {"b": 1})], rows | {"b": 7})
    assert run.history(100) == edited.history(100)
    assert run.history(101) != edited.history(101)
    for other in (
        Schedule(1, [(0, {"a": 1})], rows),
        Schedule(0, [(0, {"a": 1, "b": 1})], rows),
        Schedule(0, [(0, {"a": 1})], rows | {"a": 5}),
    ):
        assert run.history(100) != other.history(100)
    assert json.loads(json.dumps(run.history(5))) == run.history(5)


@pytest.mark.parametrize(
    ("weights", "named"),
    [({"a": -0.5, "b": 1}, "`a`"), ({"a": float("nan")}, "`a`"), ({"b": float("inf")}, "`b`")],
)
def test_senseless_weights_name_the_source(weights, named):
    with pytest.raises(RecipeError) as caught:
        Schedule(0, [(0, weights)], ROWS)
    assert named in caught.value.what


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(RecipeError, match="positive weight"):
        Schedule(0, [(0, {"a": 0.0, "b": 0})], ROWS)


def test_a_weight_for_an_unknown_source_is_refused():
    with pytest.raises(RecipeError, match="`web`"):
        Schedule(0, [(0, {"web": 1})], ROWS)


def test_an_empty_source_with_weight_is_refused():
    with pytest.raises(DataError, match=r"`empty` has weight 0\.1 but no rows"):
        Schedule(0, [(0, {"a": 0.9, "empty": 0.1})], ROWS)


def test_stages_must_follow_each_other():
    with pytest.raises(ValueError, match="at row 10 is not after row 10"):
        Schedule(0, [(0, {"a": 1}), (10, {"b": 1}), (10, {"a": 1})], ROWS)


def test_the_papers_mixture_is_shipped_as_published():
    glam, public = load_mixture("glam"), load_mixture("glam_public")
    weights = {name: source.weight for name, source in glam.sources.items()}
    assert weights == {name: source.weight for name, source in public.sources.items()}
    tokens = {name: source.tokens for name, source in glam.sources.items()}
    assert sum(tokens.values()) == 1_607_000_000_000
    # Passes over each source in 600B tokens (weights and sizes of GLaM table 3).
    rows = {name: size // 1024 for name, size in tokens.items()}
    epochs = Schedule(0, [(0, weights)], rows).epochs(600_000_000_000 // 1024)
    assert {name: round(each, 2) for name, each in epochs.items()} == {
        "webpages": 1.76, "wikipedia": 12.0, "conversations": 0.97, "forums": 0.05,
        "books": 0.31, "news": 0.02,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", load_mixture("glam_public").sources)
def test_stand_ins_are_in_the_catalogue_under_their_paths_and_fields(name):
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # registers more builders

    source = load_mixture("glam_public").sources[name]
    folder = Path(source.path)
    dataset = folder.parent.relative_to(Path.home() / "tensorflow_datasets")
    builder = tfds.builder(str(dataset), file_format="array_record")
    assert str(builder.version) == folder.name
    assert source.field in builder.info.features
