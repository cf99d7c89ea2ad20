"""Files behind URLs are read and written as local ones are; a real server of objects answers."""

import errno
import importlib
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from bucket import of_any_kind
from glamcli import atomic, storage
from glamcli.cli.main import run
from glamcli.conditional import ABSENT
from glamcli.config.load import load_recipe
from glamcli.config.mixtures import load_mixture
from glamcli.data.open import open_data
from glamcli.data.tokenizer import load_sentencepiece, train_sentencepiece
from glamcli.data.vocabulary import open_tokenizer
from glamcli.evals.tasks.items import read_jsonl
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Silent
from glamcli.storage import place
from glamcli.untrusted import open_regular, read_file
from runs import free_port, write_recipe

TASK = "kind: choice\nitems: {kind: jsonl, path: items.jsonl}\nprompt: '{q}'\noptions: choices\n"


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        if path.is_file():
            atomic.write(place(url) / path.name, path.read_bytes())


def test_a_url_stays_one_whatever_is_done_with_its_path():
    path = place("gs://bucket/runs/a.yaml")
    assert str(path) == os.fspath(path) == "gs://bucket/runs/a.yaml"
    assert str(path.parent / "b" / "c.txt") == "gs://bucket/runs/b/c.txt"
    assert str(path.with_name("x")) == "gs://bucket/runs/x"
    assert str((path.parent / "../d").resolve()) == "gs://bucket/d"
    assert (path.stem, path.suffix, path.absolute()) == ("a", ".yaml", path)
    assert path.parent == place("gs://bucket/runs/")
    assert str(path.relative_to(path.parent)) == "a.yaml"


@pytest.mark.parametrize("text", ["a/b.yaml", "/a/gs:/b", "c:/x", "gs:/b", "~", "./a://b"])
def test_a_path_that_is_no_url_is_local(text):
    assert place(text) == Path(text)


@of_any_kind
def test_a_recipe_in_a_bucket_is_the_recipe_and_has_the_same_rows(bucket, tmp_path):
    (tmp_path / "child.yaml").write_text("extends: ./tiny.yaml\ntrain: {steps: 3}\n")
    write_recipe(tmp_path)
    upload(tmp_path, f"{bucket}/recipes")
    local = load_recipe(tmp_path / "child.yaml")
    remote = load_recipe(f"{bucket}/recipes/child.yaml", [f"data.cache_dir={tmp_path / 'other'}"])
    assert remote.recipe.data.mixture == f"{bucket}/recipes/mixture.yaml"
    assert remote.place("train.steps") == f"{bucket}/recipes/child.yaml:2"
    apart = {"data": {"mixture", "cache_dir"}}
    assert remote.recipe.model_dump(exclude=apart) == local.recipe.model_dump(exclude=apart)
    here, there = (open_data(each.recipe, Silent()).fingerprint for each in (local, remote))
    assert here == there


@of_any_kind
def test_a_tokenizer_in_a_bucket_is_the_one_that_was_trained(bucket):
    path = place(f"{bucket}/tokenizer.model")
    trained = train_sentencepiece(["the cat sat on the mat"] * 20, 280, path)
    assert load_sentencepiece(path).fingerprint == trained.fingerprint
    sets = ["data.tokenizer.kind=sentencepiece", f"data.tokenizer.path={path}"]
    recipe = load_recipe("test-tiny", [*sets, "model.vocab_size=280"]).recipe
    mixture = load_mixture(recipe.data.mixture)
    found = open_tokenizer(recipe, mixture, Path("unused"), Silent())
    assert found.fingerprint == trained.fingerprint


@of_any_kind
def test_a_suite_its_task_and_its_items_are_read_from_a_bucket(bucket, tmp_path):
    (tmp_path / "suite.yaml").write_text("tasks: [mine]\n")
    (tmp_path / "mine.yaml").write_text(TASK)
    (tmp_path / "items.jsonl").write_text('{"q": "1", "choices": ["a", "b"]}\n')
    upload(tmp_path, f"{bucket}/suites")
    suite = load_suite(f"{bucket}/suites/suite.yaml")
    local = load_suite(str(tmp_path / "suite.yaml"))
    assert [task.sha256 for task in suite.tasks] == [task.sha256 for task in local.tasks]
    items = read_jsonl(suite.path.parent / "items.jsonl")
    assert items[0].fields == read_jsonl(tmp_path / "items.jsonl")[0].fields


@of_any_kind
def test_an_object_is_replaced_as_a_whole_and_read_within_bounds(bucket):
    path = place(f"{bucket}/a/b.txt")
    atomic.write(path, "first")
    atomic.write(path, "second\nline\n")
    assert read_file(path) == b"second\nline\n"
    assert read_file(path, 12) == b"second\nline\n"
    with pytest.raises(OSError) as raised:
        read_file(path, 11)
    assert raised.value.errno == errno.EFBIG
    with open_regular(path) as file:
        assert (file.readline(), file.tell()) == (b"second\n", 7)
    atomic.write(path, b"")
    assert read_file(path) == b""


def test_of_an_object_that_is_replaced_while_it_is_read_nothing_is_mixed(bucket, weather):
    path, contents = place(f"{bucket}/a"), [b"second, which is longer", b"third"]
    path.write(b"first")

    def replace(method: str, requested: str) -> None:
        if "alt=media" in requested and contents:
            path.write(contents.pop(0))

    weather.fault = replace
    assert (path.read(99), contents) == (b"third", [])


@of_any_kind
def test_objects_are_listed_with_what_changes_when_they_do(bucket):
    url = place(f"{bucket}/run")
    for name in ("a", "b", "c/d", "c/e/f"):
        atomic.write(url / name, f"of {name}")
    found, tree = url.listed(), url.tree()
    assert ({*found}, {*tree}) == ({"a", "b"}, {"a", "b", "c/d", "c/e/f"})
    assert tree["a"] == found["a"]
    assert [each.num_bytes for each in tree.values()] == [4, 4, 6, 8]
    assert abs(found["a"].unix_seconds - time.time()) < 100
    atomic.write(url / "a", "of 1")
    again = url.listed()
    assert again["a"].version != found["a"].version
    assert again["b"] == found["b"]
    assert ((url / "a").read_from(0), (url / "a").read_from(3)) == (b"of 1", b"1")
    (url / "c").delete()
    (url / "a").unlink()
    (url / "none").unlink()
    assert url.files() == ["b"]
    with pytest.raises(FileNotFoundError):
        (url / "c").listed()


@of_any_kind
def test_an_object_is_replaced_only_at_the_version_that_is_expected(bucket):
    path = place(f"{bucket}/a")
    assert path.read_at() == (b"", ABSENT)
    first = path.write_at(b"first", ABSENT)
    assert path.read_at() == (b"first", first)
    second = path.write_at(b"second", first)
    for other in (ABSENT, first):
        with pytest.raises(FileExistsError):
            path.write_at(b"third", other)
        assert path.write_at(b"second", other) == second, "only the answer to it got lost"
    path.unlink()
    with pytest.raises(FileExistsError):
        path.write_at(b"third", second)
    assert path.read_at() == (b"", ABSENT)
    with pytest.raises(FileNotFoundError):
        place(f"{bucket}-none/a").write_at(b"first", ABSENT)


def test_what_is_wrong_with_a_url_is_said_in_words(bucket, capsys):
    closed = f"http://127.0.0.1:{free_port()}/tiny.yaml"
    for url, words in (
        (f"{bucket}/none.yaml", "none.yaml: no such file"),
        ("gs://no-such-bucket-here/a.yaml", "a.yaml: no such file"),
        ("nonsense://x/a.yaml", "cannot be read: no answer, or none that helps: protocol not"),
        (closed, "cannot be read: no answer, or none that helps: cannot connect"),
        (f"{bucket}/no/run", "no/run/recipe.yaml: no such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(["recipe", "check", url])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err, url


@pytest.mark.parametrize(
    "url", ["https://h/r.yaml?sig=a//b", "gs://b//k", "https://h/a#b", "file://host/x", "gs://"]
)
def test_a_url_that_a_path_would_change_is_refused(url, capsys):
    with pytest.raises(SystemExit) as ended:
        run(["recipe", "check", url])
    assert ended.value.code == 2
    assert "not the URL of a file" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "s3", raising=False)
    with pytest.raises(OSError, match=r"pip install 'glamcli\[remote\]'"):
        read_file(place("s3://bucket/a.yaml"))


def test_a_refusal_of_the_server_is_told_as_no_permission(monkeypatch):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, format, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        try:
            for path in (place("gs://mine/a.yaml"), place(f"{url}/a.yaml")):
                with pytest.raises(PermissionError, match="no permission: "):
                    read_file(path)
        finally:
            server.shutdown()


def test_names_that_look_like_patterns_are_names(bucket):
    run = place(f"{bucket}/run[1]")
    for name in ("arrays/1/1-4/a", "arrays/1/2-[8]/a", "b", "c*"):
        (run / name).write(b"mine")
        (place(f"{bucket}/run1") / name).write(b"another's")
    assert [str(each) for each in run.folders(3)] == [
        f"{run}/arrays/1/1-4",
        f"{run}/arrays/1/2-[8]",
    ]
    assert place(f"{bucket}/none").folders(2) == []
    (run / "arrays").delete()
    run.remove(["b", "c*"])
    assert run.files() == []
    assert len(place(f"{bucket}/run1").files()) == 4


@of_any_kind
def test_a_store_that_accepts_requests_and_does_not_answer_has_failed(bucket, weather, monkeypatch):
    async def at_once(seconds):
        pass

    path, answering = place(f"{bucket}/a"), Event()
    version = path.write_at(b"first", ABSENT)
    weather.fault = lambda method, path: not answering.wait(60) or None
    with pytest.raises(OSError, match="no answer"):
        path.write_at(b"second", version, 0.5)
    with pytest.raises(OSError, match="no answer"):
        path.read_at(0.5)
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    monkeypatch.setattr(storage, "REQUEST_SECONDS", 0.2)
    for ask in (path.read_at, path.files, lambda: path.read(9)):
        with pytest.raises(OSError, match="no answer"):
            ask()
    answering.set()
