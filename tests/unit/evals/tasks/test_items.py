"""Items: read with their place, renamed, filtered, and several from one record."""

import json
import tempfile

import pytest

from glamcli.errors import DataError
from glamcli.evals.asking.prompts import _draw
from glamcli.evals.asking.question import ask
from glamcli.evals.tasks.items import Item, Library, _items_of, _prepared, read_jsonl
from glamcli.evals.tasks.schema import ItemSource, Records, Task, _Shots
from glamcli.evals.tasks.suites import TASKS, load_suite

CHOICE = Task.model_validate(
    {"data": {"path": "a.jsonl"}, "prompt": "{q}", "options": "options", "label": "label"}
)


def records(**settings):
    return Records.model_validate({"path": "a.jsonl", **settings})


def test_fields_get_the_names_that_templates_use():
    record = Item({"q": {"stem": "S"}, "n": 1, "big": "..."}, "a.jsonl:1")
    where = records(fields={"stem": "q.stem", "text": "{q.stem}!"}, drop=("big",))
    (item,) = _items_of(where, record)
    assert item.fields == {"q": {"stem": "S"}, "n": 1, "stem": "S", "text": "S!"}
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field `q\.steam`"):
        list(_items_of(records(fields={"stem": "q.steam"}), record))


@pytest.mark.parametrize("value", [[], "", False, 0])
def test_where_keeps_records_whose_field_holds_something(value):
    assert not list(_items_of(records(where="f"), Item({"f": value}, "a.jsonl:1")))
    assert list(_items_of(records(where="f"), Item({"f": [value]}, "a.jsonl:1")))


def test_a_record_of_lists_is_several_items_that_know_the_earlier_ones():
    record = Item({"s": "x", "q": ["a", "b"], "more": {"0": [1, 2], "n": 5}}, "a.jsonl:4")
    first, second = _items_of(records(each=("q", "more.0")), record)
    assert first.fields == {"s": "x", "q": "a", "more": {"0": 1, "n": 5}}
    assert second.fields == {"s": "x", "q": "b", "more": {"0": 2, "n": 5}}
    assert (first.earlier, second.earlier) == ((), (first,))
    assert second.place == "a.jsonl:4 (q 1)"
    assert first.key != second.key


def test_lists_of_different_lengths_are_refused_with_the_line():
    record = Item({"q": ["a", "b"], "o": [1]}, "a.jsonl:4")
    with pytest.raises(DataError, match=r"a\.jsonl:4: lists of different lengths: .*`o` has 1"):
        list(_items_of(records(each=("q", "o")), record))
    with pytest.raises(DataError, match=r"a\.jsonl:4: `s` is str, not a list"):
        list(_items_of(records(each=("s",)), Item({"s": "x"}, "a.jsonl:4")))


def test_the_second_place_is_read_when_the_first_is_not_there(tmp_path):
    data = {"path": "a.jsonl", "otherwise": {"path": "b.jsonl", "fields": {"q": "other"}}}
    task = CHOICE.model_copy(update={"data": Task.model_validate({**PLAIN, "data": data}).data})
    library = Library(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl, nor .*b\.jsonl"):
        library.items(task, tmp_path / "task.yaml")
    (tmp_path / "b.jsonl").write_text('{"other": 1}\n')
    assert [item.fields["q"] for item in library.items(task, tmp_path / "task.yaml")] == [1]
    (tmp_path / "a.jsonl").write_text('{"q": 2}\n')
    assert [item.fields["q"] for item in library.items(task, tmp_path / "task.yaml")] == [2]


def test_the_same_questions_have_the_same_keys_and_shots_in_every_form(tmp_path):
    """As authors' JSONL and as TFDS prepares it: other names, further fields, another order."""
    (boolq,) = load_suite("boolq").tasks
    lines = [{"passage": f"P{i}", "question": f"q{i}", "label": i % 2 == 0} for i in range(9)]
    forms = {
        "authors": [{**line, "idx": i} for i, line in enumerate(lines)],
        "tfds": [
            {"passage": line["passage"], "question": line["question"],
             "answer": line["label"], "title": "T"}
            for line in lines[::-1]
        ],
    }  # fmt: skip
    drawn = {}
    for name, records in forms.items():
        fields = {"label": "answer"} if name == "tfds" else {}
        data = {"path": f"{name}.jsonl", "fields": fields}
        task = boolq.task.model_copy(
            update={
                "data": ItemSource.model_validate(data),
                "shots": _Shots.model_validate({"source": "pool", "data": data}),
            }
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        library = Library(tmp_path)
        items = library.items(task, tmp_path / "t.yaml")
        pool = [ask(task, item, True) for item in library.pool(task, tmp_path / "t.yaml", items)]
        drawn[name] = {
            item.key: [each.contexts for each in _draw(task, "boolq", ask(task, item), pool, 3, 0)]
            for item in items
        }
    assert len(drawn["tfds"]) == 9
    assert drawn["authors"] == drawn["tfds"]


PLAIN = {"prompt": "{q}", "options": "options", "label": "label"}


def test_shipped_tasks_are_looked_for_where_their_data_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"glam/eval/a\.jsonl") as caught:
        Library().items(CHOICE, TASKS / "piqa.yaml")
    assert "`glam eval data piqa`" in (caught.value.hint or "")


def test_items_are_read_with_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"q": 1}).encode() + b'\r\n\n{"q": 2}\n')
    assert [(item.fields["q"], item.place) for item in read_jsonl(path)] == [
        (1, f"{path}:1"),
        (2, f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no items"),
        (b'{"a": 1}\n{"a": \n', ":2: not JSON"),
        (b'{"a": 1}\n["a"]\n', ":2: not a JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not UTF-8"),
        (b"[" * 100_000, ":1: not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", ":1: not JSON: a number is too long"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path, content, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert reason in caught.value.what


def test_a_missing_file_names_the_option_that_finds_it(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl") as caught:
        Library().items(CHOICE, tmp_path / "task.yaml")
    assert "--data-dir" in (caught.value.hint or "")


def test_a_prepared_directory_is_read_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    (tmp_path / "left").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "left"))  # by TFDS, by every builder

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"q": tfds.features.Text(), "options": tfds.features.Sequence(tfds.features.Text())}
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"q": "Ü?", "options": ["a", "b"]}

    Pairs(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    (folder,) = tmp_path.glob("*/1.0.0")
    (item,) = _prepared(folder, "validation")
    assert item.fields == {"q": "Ü?", "options": ["a", "b"]}
    with pytest.raises(DataError, match=r"no split `test`.*`validation`"):
        list(_prepared(folder, "test"))
    with pytest.raises(DataError, match="cannot be read as a prepared TFDS folder"):
        list(_prepared(tmp_path, "validation"))
    (shard,) = folder.glob("*.array_record*")
    whole = shard.read_bytes()
    for damaged in (whole[:-9], bytes(len(whole))):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match="example 0 is damaged: "):
            list(_prepared(folder, "validation"))
    (folder / "features.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a prepared TFDS folder: "):
        list(_prepared(folder, "validation"))
