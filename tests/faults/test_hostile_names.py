"""Names in files that somebody else wrote lead to nothing outside of the folders that are named."""

import json
from pathlib import Path

import pytest

ITEM = '{"q": "stone", "o": ["river", "light"], "right": 1}\n'
TASK = """
data: {{path: {path!r}}}
prompt: "{{q}}"
options: o
label: right
origin:
  page: https://example.org
  files: [{{name: {name!r}, url: https://example.org/x, shape: jsonl, to: {to!r}}}]
"""


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder for the data of tasks, one with the authors' files, and a file beside them."""
    for name in ("data", "given", "elsewhere", "suite"):
        (tmp_path / name).mkdir()
    (tmp_path / "given" / "authors.jsonl").write_text(ITEM)
    (tmp_path / "beside.jsonl").write_text(ITEM)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "suite")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def provide(glam, folder, path, name="authors.jsonl"):
    """`glam eval data --from` for a task with this path, made of the authors' file of this name."""
    task = TASK.format(path=path, name=name, to=Path(path).name)
    (folder / "suite" / "task.yaml").write_text(task)
    before = files(folder)
    place = ("--data-dir", folder / "data", "--from", folder / "given", "--offline")
    code, out, err = glam("eval", "data", "task.yaml", *place)
    return code, out + err, files(folder) - before


def test_a_file_of_the_authors_becomes_one_below_the_data_folder(glam, places):
    code, said, made = provide(glam, places, "below/items.jsonl")
    assert (code, made) == (0, {"data/below", "data/below/items.jsonl"}), said


@pytest.mark.parametrize("path", ["../items.jsonl", "link/items.jsonl", "{}/elsewhere/items.jsonl"])
def test_nothing_is_written_outside_of_the_data_folder(glam, places, path):
    code, said, made = provide(glam, places, path.format(places))
    assert (code, made) == (3, set())
    assert "outside of the data folder" in said


@pytest.mark.parametrize(
    "name", ["../beside.jsonl", "/etc/passwd", "", "a**b/*.jsonl", "./authors.jsonl", "x//y"]
)
def test_no_file_outside_of_the_given_folder_is_read(glam, places, name):
    code, said, made = provide(glam, places, "items.jsonl", name)
    assert (code, made) == (3, set())
    assert f"`{name}` is not the name of a file below the folder of `--from`" in said


@pytest.mark.parametrize("name", ["../../up/1.0.0", "/tmp/x/1.0.0", "a:b/1.0.0", "a/../b/1.0.0"])
def test_tfds_is_asked_for_nothing_but_a_dataset(glam, places, name, monkeypatch):
    asked = []
    monkeypatch.setattr("glamcli.evals.tasks.provision.is_reachable", lambda url: True)
    monkeypatch.setattr(
        "glamcli.evals.tasks.provision.prepare_directory", lambda *args: asked.append(args)
    )
    task = f'data: {{kind: tfds, path: "{name}", split: test}}\nprompt: "{{q}}"\n'
    (places / "suite" / "task.yaml").write_text(task + "options: o\nlabel: right\n")
    code, _, err = glam("eval", "data", "task.yaml", "--data-dir", places / "data")
    assert (code, asked) == (3, [])
    assert "is not the name of a dataset of TFDS" in err


def test_a_preset_whose_name_leads_out_of_the_results_folder_is_refused(glam, places):
    presets = 'presets: {"../../up": {delimiter: ""}}\n'
    (places / "suite" / "task.yaml").write_text(
        TASK.format(path="x.jsonl", name="x", to="x") + presets
    )
    code, out, _ = glam("eval", "data", "task.yaml", "--offline", "--preset", "../../up", "--json")
    assert code == 3
    (found,) = map(json.loads, out.splitlines())
    assert "`../../up` has a name of more than letters" in found["why"][0]


@pytest.mark.parametrize("name", ["../../up", "..", "/etc/x", "a" * 300, "\N{SNOWMAN}" * 300])
def test_rows_of_a_source_of_any_name_are_below_the_cache(glam, places, name):
    (places / "suite" / "words.txt").write_text("some words\n" * 50)
    source = {"kind": "text", "path": "words.txt", "separator": "line", "weight": 1}
    (places / "suite" / "mixture.yaml").write_text(
        json.dumps({"sources": {name: source}}, ensure_ascii=False)
    )
    before = files(places)
    mixture, cache = "data.mixture=mixture.yaml", f"data.cache_dir={places}/cache"
    code, _, err = glam("data", "show", "test-tiny", "--set", mixture, "--set", cache)
    assert code == 0, err
    assert all(path.startswith("cache") for path in files(places) - before)
