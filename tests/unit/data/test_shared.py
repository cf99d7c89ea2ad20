"""What machines share behind a URL is made by one of them, and copied whole by the others."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest

from bucket import of_any_kind
from glamcli.config.load import load_recipe
from glamcli.data import prepare, vocabulary
from glamcli.data.open import open_data
from glamcli.data.rows import TOKEN_FIELDS
from glamcli.errors import DataError
from glamcli.progress import Progress, Silent
from glamcli.storage import place
from runs import write_recipe

TRAINED = ["data.tokenizer.kind=sentencepiece", "model.vocab_size=300"]


class Told(Progress):
    def __init__(self):
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def on_with(monkeypatch, tmp_path):
    """Opens the data of a recipe with a cache in a bucket, on the machine of this name."""
    path = write_recipe(tmp_path)

    def opened(bucket: str, machine: str, *sets: str, progress: Progress | None = None):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        loaded = load_recipe(path, [f"data.cache_dir={bucket}/cache", *sets])
        return open_data(loaded.recipe, progress or Silent())

    return opened


@pytest.fixture
def on(on_with, bucket):
    return partial(on_with, bucket)


@pytest.fixture
def no_work(monkeypatch):
    """Nothing can be prepared or trained any more."""
    monkeypatch.setattr(prepare, "_prepare_source", None)
    monkeypatch.setattr(vocabulary, "train_on", None)


@of_any_kind
def test_rows_and_tokenizer_are_made_once(on_with, bucket, request):
    first = on_with(bucket, "first", *TRAINED)
    request.getfixturevalue("no_work")
    other = on_with(bucket, "other", *TRAINED)
    assert other.fingerprint == first.fingerprint
    assert other.heldout_documents() == first.heldout_documents()
    for name, rows in first.prepared.train.items():
        assert rows.folder != other.prepared.train[name].folder
        other.prepared.train[name].verify()
        a, b = rows[0], other.prepared.train[name][0]
        assert all((a[field] == b[field]).all() for field in TOKEN_FIELDS)


def test_what_was_prepared_before_is_shared_as_well(on, request, tmp_path):
    kept = f"data.cache_dir={tmp_path}/first/glam"
    first = on("first", *TRAINED, kept)
    on("first", *TRAINED)
    request.getfixturevalue("no_work")
    assert on("other", *TRAINED).fingerprint == first.fingerprint


def test_what_a_kill_left_is_not_taken(on, bucket):
    first = on("first")
    for name in place(f"{bucket}/cache").files():
        if name.endswith("complete.json"):
            place(f"{bucket}/cache/{name}").unlink()
    assert on("other").fingerprint == first.fingerprint
    assert sum(n.endswith("complete.json") for n in place(f"{bucket}/cache").files()) == 2


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("heldout.jsonl", b"{}\n", "heldout.jsonl is not as it was written"),
        ("heldout.jsonl", None, "there is no such object"),
        ("complete.json", b"{", "complete.json cannot be read"),
        ("complete.json", b'{"folder": "..", "files": {}}', "names `..`, which is elsewhere"),
    ],
)
def test_damage_is_named_and_leaves_nothing(on, request, bucket, tmp_path, file, content, what):
    on("first")
    request.getfixturevalue("no_work")
    (name, *_) = [n for n in place(f"{bucket}/cache").files() if n.endswith(file)]
    path = place(f"{bucket}/cache/{name}")
    path.unlink() if content is None else path.write(content)
    with pytest.raises(DataError) as caught:
        on("other")
    assert what in caught.value.what
    assert f"{bucket}/cache/rows/" in caught.value.what
    rows = tmp_path / "other/glam/rows"
    assert not [p for p in rows.glob("*") if p.name in name]


def test_damaged_rows_are_not_shared(on, bucket, tmp_path):
    kept = f"data.cache_dir={tmp_path}/first/glam"
    shard = (
        on("first", kept).prepared.train["words"].folder / "rows-train.array_record-00000-of-00001"
    )
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="checksum differs"):
        on("first")
    assert not [n for n in place(f"{bucket}/cache/rows").files() if n.startswith("words")]


def test_a_bucket_that_cannot_be_written_costs_a_warning(on, weather, bucket):
    weather.fault = lambda method, path: 403 if method == "POST" else None
    told = Told()
    assert on("first", progress=told).fingerprint == on("other").fingerprint
    assert len(told.warnings) == 2
    assert all("other machines make it again" in text for text in told.warnings)


@pytest.mark.slow
def test_two_that_prepare_at_once_both_have_it_and_leave_it_whole(on, request, bucket, tmp_path):
    words = ["data", "prepare", str(tmp_path / "tiny.yaml"), "--set"]
    command = [sys.executable, "-c", "from glamcli.cli.main import run; run()", *words]
    racing = [
        subprocess.Popen(
            [*command, f"data.cache_dir={bucket}/cache"],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / machine)},
        )
        for machine in ("a", "b")
    ]
    assert [process.wait(120) for process in racing] == [0, 0]
    request.getfixturevalue("no_work")
    of_all = [on(machine).fingerprint for machine in ("a", "b", "c")]
    assert of_all[0] == of_all[1] == of_all[2]
    for name in place(f"{bucket}/cache").files():
        if name.endswith("complete.json"):
            entry = json.loads(place(f"{bucket}/cache/{name}").read(1 << 20))
            assert "rows.json" in entry["files"]
