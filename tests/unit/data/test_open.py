import json
from pathlib import Path

import numpy as np
import pytest

from glamcli.config.load import load_recipe
from glamcli.config.schema import Data, Recipe
from glamcli.data.cache import cache_dir
from glamcli.data.open import Dataset, open_data
from glamcli.errors import DataError
from glamcli.progress import Silent

MIXTURE = """
sources:
  web: {kind: jsonl, path: web.jsonl, weight: 3}
  books: {kind: jsonl, path: books.jsonl, weight: 1}
  unused: {kind: jsonl, path: books.jsonl, weight: 0}
heldout_frac: 0.2
stages:
  - {from_step: 5, weights: {books: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name, num in (("web", 60), ("books", 25)):
        lines = [json.dumps({"text": f"{name} {i}: " + "word " * (i % 17 + 5)}) for i in range(num)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "mix.yaml").write_text(MIXTURE)
    data = Data(
        mixture=str(tmp_path / "mix.yaml"),
        tokenizer=load_recipe("test-tiny").recipe.data.tokenizer,
        cache_dir=str(tmp_path / "cache"),
        prepare_processes=1,
    )
    return load_recipe("test-tiny").recipe.model_copy(update={"data": data})


def first_shard(data: Dataset, name: str) -> Path:
    rows = data.prepared.train[name]
    return rows.folder / rows.shards[0].file


def test_batches_are_the_prepared_rows_in_the_order_of_the_schedule(recipe):
    data = open_data(recipe, Silent())
    with data.batches(3, 4) as stream:
        got = list(stream)
    for step, batch in enumerate(got, 3):
        for i in range(recipe.batch.rows):
            place = data.schedule.locate(step * recipe.batch.rows + i)
            assert data.source_names[batch["source"][i]] == place.source
            row = data.prepared.train[place.source][place.row]
            for field, array in row.items():
                assert np.array_equal(batch[field][i], array)


def test_stages_begin_at_their_step(recipe):
    data = open_data(recipe, Silent())
    rows = recipe.batch.rows
    assert data.schedule.counts(0, 5 * rows) == {"web": 30, "books": 10, "unused": 0}
    assert data.schedule.counts(5 * rows, 9 * rows) == {"web": 0, "books": 32, "unused": 0}


def test_every_training_token_comes_once_per_epoch(recipe):
    data = open_data(recipe, Silent())
    seen = dict.fromkeys(data.source_names, 0)
    for name, rows in data.prepared.train.items():
        for i in range(len(rows)):
            seen[name] += int((rows[i]["segments"] > 0).sum())
    for line in data.summary(steps=20):
        assert line["num_tokens"] == seen[line["name"]]
        assert line["run_tokens"] == pytest.approx(line["epochs"] * line["num_tokens"])
    lines = {line["name"]: line for line in data.summary(steps=20)}
    assert lines["web"]["weight_asked"] == 0.75
    assert lines["web"]["weight_realised"] == 30 / 160
    assert lines["unused"]["epochs"] == 0
    assert sum(line["run_rows"] for line in lines.values()) == 160


def test_held_out_documents_are_not_in_training_rows(recipe):
    data = open_data(recipe, Silent())
    rows = data.prepared.train["web"]
    ids = [t for i in range(len(rows)) for t in rows[i]["tokens"][rows[i]["segments"] > 0].tolist()]
    text = data.tokenizer.decode(ids)
    heldout = data.prepared.heldout_documents("web")
    assert heldout
    assert not any(document.strip() in text for document in heldout)


def test_opening_again_reads_the_same_and_writes_nothing(recipe, tmp_path):
    one = open_data(recipe, Silent())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    two = open_data(recipe, Silent())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert one.fingerprint == two.fingerprint
    assert json.loads(json.dumps(one.fingerprint)) == one.fingerprint


def test_a_changed_source_changes_its_fingerprint_only(recipe, tmp_path):
    before = open_data(recipe, Silent()).fingerprint
    with (tmp_path / "web.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    after = open_data(recipe, Silent()).fingerprint
    assert before["sources"].pop("web") != after["sources"].pop("web")
    assert before == after


def test_a_tokenizer_larger_than_the_model_is_refused(recipe):
    small = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": 258})})
    with pytest.raises(DataError, match="the tokenizer has 259 ids"):
        open_data(small, Silent())


def test_all_missing_sources_are_told_at_once(recipe, tmp_path):
    for name in ("web", "books"):
        (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        open_data(recipe, Silent())
    for word in ("`web`", "`books`", "`unused`", "web.jsonl", "3 of 3"):
        assert word in caught.value.what


def test_all_broken_sources_are_reported_at_once(recipe, tmp_path):
    (tmp_path / "web.jsonl").write_text('{"text": "one"}\nnot JSON\n')
    (tmp_path / "books.jsonl").write_text('{"body": "two"}\n')
    with pytest.raises(DataError) as caught:
        open_data(recipe, Silent())
    for what in ("2 problems", "web.jsonl:2: not JSON", "books.jsonl:1: no field `text`"):
        assert what in caught.value.what


@pytest.mark.parametrize("place", ["cache", "cache/rows"])
def test_a_cache_that_cannot_be_written_is_told_with_a_way_out(recipe, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("in the way")
    with pytest.raises(DataError, match=r"the cache folder .*/cache cannot be written: ") as caught:
        open_data(recipe, Silent())
    assert "`data.cache_dir`" in (caught.value.hint or "")


def test_flipped_bytes_stop_the_stream_with_source_and_file(recipe):
    data = open_data(recipe, Silent())
    path = first_shard(data, "web")
    content = bytearray(path.read_bytes())
    # All over the records: a few bytes are padding, and flipping those changes nothing.
    for at in range(100, int(np.flatnonzero(np.frombuffer(content, np.uint8))[-1]), 97):
        content[at] ^= 1
    path.write_bytes(content)
    damaged = open_data(recipe, Silent())
    with damaged.batches(0, 40) as stream, pytest.raises(DataError) as caught:
        list(stream)
    assert "of source `web`" in caught.value.what
    assert str(path) in caught.value.what


def test_cache_is_in_the_users_cache_folder_unless_the_recipe_says(recipe, monkeypatch):
    assert cache_dir(recipe) == Path(recipe.data.cache_dir or "")
    default = load_recipe("test-tiny").recipe
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir(default) == Path("/somewhere/glam")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir(default) == Path.home() / ".cache/glam"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir(default) == Path.home() / ".cache/glam"


def test_the_error_of_one_source_is_not_its_own_cause(recipe):
    (Path(recipe.data.mixture).parent / "web.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        open_data(recipe, Silent())
    assert caught.value.__cause__ is not caught.value
