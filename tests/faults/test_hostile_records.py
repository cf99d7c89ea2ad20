"""Files that glam itself wrote, and those of the authors of datasets, made hostile."""

import hashlib
import json
import random
import shutil
from contextlib import suppress

import pytest

from faults.hostile_inputs import SPECIAL, as_json, changed, check, damaged, remove, replace
from glamcli.evals.results.scores import Average, Measured, Reported, Results, Score, Subset
from glamcli.evals.results.store import keep_results
from glamcli.progress import Silent
from glamcli.step_folders import checksum
from unit.evals.tasks.test_convert import FILES as ORIGINALS
from unit.evals.tasks.test_convert import write

TRIES, FEW_TRIES = 40, 4
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]
BASELINES = {"random": 0.5, "position": None, "majority": 0.6}


def hostile(path, rng):
    """Another content for a file: some bytes or one meaning changed, or something else entirely."""
    good = path.read_bytes()
    if rng.random() < 0.1:
        replace(path, rng.choice(SPECIAL))
        return f"{path.name} replaced"
    if rng.random() < 0.3 or not good.lstrip().startswith((b"{", b"[")):
        path.write_bytes(damaged(good, rng))
        return f"{path.name}: {path.read_bytes()[:1500]!r}"
    try:
        text = as_json(*changed(json.loads(good), rng))
    except ValueError:  # lines of JSON
        lines = good.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = as_json(*changed(json.loads(lines[number]), rng))
        text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{path.name}: {text[:1500]}"


def rows_signed_again(path):
    """Gives the description of prepared rows the checksum of what it now says."""
    content = json.loads(path.read_text())["content"]
    text = json.dumps(content, indent=1, sort_keys=True)
    signed = {"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_text(json.dumps(signed))


def step_signed_again(path):
    """Gives the description of a step the checksum of what it now says."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "checksum": checksum(content)}))


SIGNED = {"rows.json": rows_signed_again, "metadata": step_signed_again}


def tried(glam, folder, rng, number, *commands):
    """Makes one file below a folder hostile, runs the commands, and undoes it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    path = rng.choice(files)
    good = path.read_bytes()
    what = hostile(path, rng)
    if path.name in SIGNED and path.is_file() and rng.random() < 0.7:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            SIGNED[path.name](path)
    for command in commands:
        check(glam, command, (number, what))
    remove(path)
    if path.parent.is_dir():
        path.write_bytes(good)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ORIGINALS)
def test_files_of_authors(glam, tmp_path, name, seed):
    write(tmp_path / "given", ORIGINALS[name][0])
    rng = random.Random(f"{name} {seed}")
    places = ("--data-dir", tmp_path / "data", "--from", tmp_path / "given", "--offline")
    command = ("eval", "data", name, *places)
    assert check(glam, command, "nothing") == 0
    for number in range(TRIES if seed else FEW_TRIES):
        shutil.rmtree(tmp_path / "data")
        (tmp_path / "data").mkdir()
        tried(glam, tmp_path / "given", rng, number, command)


@pytest.mark.parametrize("seed", SEEDS)
def test_kept_results(glam, tmp_path, seed):
    records = [
        {"task": "a", "setting": "1", "key": f"k{number}", "accuracy": float(number % 2),
         "gold": number % 2, "chosen": 1, "tied": [0, 1], "group": "g",
         "wanted_class": "yes", "found_class": "no", "answer_nats": -1.0,
         "options": [{"text": "yes"}, {"text": "no"}], "shots_fitted": 1,
         "prompt_sha256": f"p{number}", "place": f"f:{number}"}
        for number in range(3)
    ]  # fmt: skip
    measured = tuple(
        Measured(metric, 0.5, 0.1, BASELINES, (0.1, 0.9), (Reported("GPT-3", 60.5, False),))
        for metric in ("accuracy", "f1a", "question_em", "macro_f1", "perplexity")
    )
    subsets, conditions = (Subset("kind", "x", 1, measured),), {"scorer": "sum", "seed": 0}
    score = Score("a", 1, "1", measured, 3, 1, 0, 0, ("why",), conditions, subsets, tuple(records))
    average = Average("all", "1", 0.5, 2, ("b",), (Reported("GPT-3", 60.5, True),))
    model = {"step": 3, "tokenizer": "t", "versions": {"jax": "1"}, "params_digest": "ab" * 32}
    for run in ("first", "second"):
        keep_results(
            Results("s", model, (score,), (), (), (average,), "mean"), tmp_path / run, Silent()
        )
    commands = [
        ("eval", "show", tmp_path / "first"),
        ("eval", "show", tmp_path / "first", tmp_path / "second"),
    ]
    assert [check(glam, each, "nothing") for each in commands] == [0, 0]
    rng = random.Random(seed)
    for number in range(10 * TRIES if seed else 2 * FEW_TRIES):
        tried(glam, tmp_path / "first", rng, number, *commands)


@pytest.mark.parametrize("seed", SEEDS)
def test_prepared_rows_and_other_files_of_the_cache(glam, tmp_path, seed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(
        "".join(f"line {number} of many words, {number * number}\n" for number in range(99))
    )
    (tmp_path / "mixture.yaml").write_text(
        "sources: {words: {kind: text, path: words.txt, separator: line, weight: 1}}\n"
        "heldout_frac: 0.1\n"
    )
    settings = {
        "data.mixture": "./mixture.yaml", "data.cache_dir": "./cache", "model.vocab_size": 300,
        "data.tokenizer.kind": "sentencepiece",
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    commands = [("data", name, "test-tiny", *sets) for name in ("show", "verify", "show")]
    assert [check(glam, each, "nothing") for each in commands] == [0, 0, 0]
    shutil.copytree("cache", "good")
    rng = random.Random(seed)
    for number in range(3 * TRIES if seed else 2 * FEW_TRIES):
        tried(glam, tmp_path / "cache", rng, number, *commands)
        shutil.rmtree("cache")
        shutil.copytree("good", "cache")
