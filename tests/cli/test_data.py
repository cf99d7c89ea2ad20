"""`glam data` as a person meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GLAM = (sys.executable, "-c", "from glamcli.cli.main import run; run()")
RECIPE = """
extends: test-tiny
data:
  mixture: ./mix.yaml
  cache_dir: ./cache
"""
MIXTURE = """
sources:
  web: {kind: jsonl, path: "web*.jsonl", weight: 0.75}
  books: {kind: jsonl, path: books.jsonl, weight: 0.25}
  rare: {kind: jsonl, path: rare.jsonl, weight: 0}
heldout_frac: 0.1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "mix.yaml").write_text(MIXTURE)
    for name, num in (("web", 40), ("books", 20), ("rare", 4)):
        texts = [f"{name} {i}\twith \x1b[31mcolour " + "and words " * (i % 7) for i in range(num)]
        # One copy within `web`, one of a document of `web` in `books`.
        texts += {
            "web": texts[:1],
            "books": ["web 3\twith \x1b[31mcolour " + "and words " * 3],
        }.get(name, [])
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "my.yaml")


def test_tokenizer_rows_and_order_do_not_depend_on_the_hash_seed_of_python(recipe, tmp_path):
    """Sets and dicts are everywhere; what is made from them must not take their order."""
    with open(recipe, "a") as file:
        file.write("  tokenizer: {kind: sentencepiece, train_vocab_size: 400}\n")
    mixture = tmp_path / "mix.yaml"
    embedded = "  python: {kind: embedded, path: reference, weight: 0.5, max_documents: 8}\n"
    mixture.write_text(mixture.read_text().replace("sources:\n", "sources:\n" + embedded))
    made = []
    for seed in ("1", "2"):
        cache = tmp_path / f"cache{seed}"
        asked = ["data", "show", recipe, "--rows", "9", "--json"]
        found = subprocess.run(
            [*GLAM, *asked, "--set", f"data.cache_dir={cache}"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert found.returncode == 0, found.stderr
        # A lock names the process that held it.
        paths = (path for path in cache.rglob("*") if path.suffix != ".lock")
        files = {path.relative_to(cache): path for path in paths if path.is_file()}
        content = {str(name): path.read_bytes() for name, path in files.items()}
        shown = [line for line in found.stdout.splitlines() if '"phase"' not in line]  # of seconds
        made.append((shown, content))
    assert made[0] == made[1]
    assert len([name for name in made[0][1] if "train.array_record" in name]) == 4
    assert [name for name in made[0][1] if name.endswith(".model")]


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_credentials_of_a_source_are_never_shown(recipe, glam, debug):
    mixture = Path(recipe).parent / "mix.yaml"
    mixture.write_text(MIXTURE.replace("books.jsonl", "ftp://user:CANARY@127.0.0.1:9/x.jsonl"))
    code, out, err = glam(*debug, "data", "prepare", recipe)
    assert code == 3
    assert "ftp://***@127.0.0.1:9/x.jsonl" in err
    assert ("Traceback" in err) == bool(debug)
    assert "CANARY" not in out + err


def shard(recipe: str, name: str) -> Path:
    return next((Path(recipe).parent / "cache/rows").glob(f"{name}-*/rows-train.array_record-*"))


def test_show_prints_the_table_and_rows_without_control_characters(recipe, glam):
    code, out, err = glam("data", "show", recipe, "--rows", "4")
    assert code == 0
    header = out.splitlines()[1].split()
    assert header[:5] == ["source", "weight", "realised", "documents", "rows"]
    assert out.splitlines()[2].split()[:3] == ["web", "0.75", "0.75"]
    assert out.splitlines()[4].split()[-1] == "0"  # epochs of `rare`
    assert out.count("\nstep 0 row ") == 4
    assert "<s>" in out
    assert "</s>" in out
    assert "\\t" in out
    assert "\\x1b[31m" in out
    assert "\x1b" not in out
    assert "preparing web" in err


def test_show_of_one_source_starts_at_the_step_asked_for(recipe, glam):
    code, out, _ = glam(
        "data", "show", recipe, "--source", "books", "--step", "7", "--rows", "5", "--json"
    )
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["name"] for event in events if event["event"] == "source"] == [
        "web", "books", "rare",
    ]  # fmt: skip
    rows = [event for event in events if event["event"] == "row"]
    # A quarter of 8 rows per step is 2.
    assert [row["source"] for row in rows] == ["books"] * 5
    assert [row["step"] for row in rows] == [7, 7, 8, 8, 9]
    assert any("books" in piece for row in rows for piece in row["pieces"])


def test_a_source_without_weight_has_no_rows_to_show(recipe, glam):
    code, out, _ = glam("data", "show", recipe, "--source", "rare", "--json")
    assert code == 0
    assert not [line for line in out.splitlines() if '"row"' in line]


def test_an_unknown_source_is_answered_with_the_known_ones(recipe, glam):
    code, _, err = glam("data", "show", recipe, "--source", "wbe")
    assert code == 2
    assert "no source is called `wbe`" in err
    assert "hint: the mixture has `web`, `books`, `rare`" in err


def test_preparing_twice_prepares_once(recipe, glam):
    assert "preparing web" in glam("data", "prepare", recipe)[2]
    code, out, err = glam("data", "prepare", recipe)
    assert code == 0
    assert "preparing" not in err
    assert "web" in out


def test_the_name_of_a_mixture_is_explained(glam):
    code, _, err = glam("data", "prepare", "glam_public")
    assert code == 2
    assert "hint: name a recipe and add `--set data.mixture=glam_public`" in err


def test_sources_that_are_not_there_exit_3(recipe, glam):
    code, _, err = glam("data", "prepare", recipe, "--set", "data.mixture=glam")
    assert code == 3
    assert "6 of 6 sources cannot be read" in err
    assert "glam_data/wikipedia" in err


def test_verify_is_content_with_whole_files_and_counts_copies(recipe, glam):
    code, out, _ = glam("data", "verify", recipe, "--duplicates")
    assert code == 0
    cells = [line.split() for line in out.splitlines()]
    assert ["web", "1", "0"] in cells
    assert ["books", "0", "1"] in cells
    assert ["rare", "0", "0"] in cells
    assert "rows of 3 sources are as prepared" in out


def test_verify_names_every_damaged_file(recipe, glam):
    glam("data", "prepare", recipe)
    for name in ("web", "rare"):
        path = shard(recipe, name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    code, out, err = glam("data", "verify", recipe)
    assert code == 3
    assert "as prepared" not in out
    for name in ("web", "rare"):
        assert f"{shard(recipe, name)}: checksum differs" in err
    assert "books" not in err.replace(str(Path(recipe).parent), "")


def test_a_truncated_file_exits_3_with_its_name(recipe, glam):
    glam("data", "prepare", recipe)
    path = shard(recipe, "books")
    path.write_bytes(path.read_bytes()[:-100])
    code, _, err = glam("data", "verify", recipe)
    assert code == 3
    assert str(path) in err


def test_data_commands_do_not_import_jax(recipe):
    program = (
        "import sys; from glamcli.cli.main import root\n"
        f"root(['data', 'show', {recipe!r}], standalone_mode=False)\n"
        "assert not {'jax', 'flax', 'grain', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
