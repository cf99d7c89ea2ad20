"""Files of every kind that glam reads, made hostile: success, or one clear error."""

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from faults.hostile_inputs import (
    SPECIAL,
    as_json,
    as_yaml,
    changed,
    check,
    damaged,
    remove,
    replace,
)
from glamcli.config.chips import CHIPS_FILE
from glamcli.data.tokenizer import train_sentencepiece

RECIPE = {
    "extends": "test-tiny",
    "about": "a recipe",
    "model": {"num_layers": 4, "vocab_size": 300},
    "moe": {"num_experts": 4, "second_policy": "random"},
    "batch": {"rows": 8, "row_tokens": 64},
    "optimizer": {"learning_rate": 0.01, "hold_steps": 10},
    "train": {"steps": 4},
    "mesh": {"data": "auto", "expert": 1, "model": 1},
    "data": {"mixture": "./mixture.yaml", "cache_dir": "./cache", "tokenizer": {"kind": "bytes"}},
    "every": {"log_steps": 3, "checkpoint_steps": 4},
    "checkpoints": {"keep": 2},
    "finish": {"suite": "quick"},
    "seed": 1,
}
MIXTURE = {
    "sources": {
        "words": {
            "kind": "jsonl", "path": "words*.jsonl", "weight": 0.7, "field": "text",
            "where": {"language": "en", "meta.good": True}, "min_chars": 1, "max_documents": 50,
        },
        "lines": {"kind": "text", "path": "lines.txt", "weight": 0.3, "separator": "line"},
    },
    "heldout_frac": 0.1,
    "stages": [{"from_step": 2, "weights": {"words": 1, "lines": 0.5}}],
}  # fmt: skip
DOCUMENT = {"text": "a document with some words", "language": "en", "meta": {"good": True}}
CHOICE = {
    "about": "a task",
    "data": {"path": "items.jsonl", "fields": {"q": "question", "n": "{a.b|upper_first}"}},
    "shots": {"few": 2, "draw": "fixed"},
    "header": "Answer.",
    "prompt": "{q|strip} {n} {rest|upto:where}",
    "options": "options",
    "option_text": "{option|lower}",
    "num_options": 2,
    "label": "right",
    "labels": "names",
    "metrics": ["accuracy", "macro_f1"],
    "by": ["a.b"],
    "group": "{q}",
    "with_shots": {"delimiter": "\n"},
    "presets": {"gpt3": {"scorer": "uncond", "uncond_context": ""}},
    "published": [{"model": "GLaM", "zero": 50.0}],
    "origin": {
        "page": "https://example.org",
        "files": [{"name": "*.jsonl", "url": "https://x", "shape": "jsonl", "to": "items.jsonl"}],
    },
}
OPEN = {
    "data": {"path": ["items.jsonl"], "where": "where", "each": ["turns.q", "turns.a"]},
    "history": "{turns.q} {answer}",
    "prompt": "{history}{question}",
    "answers": ["{turns.a}", "{options|all_if_any}"],
    "scorer": "generate",
    "metrics": ["em", "f1"],
    "no_answer": "none",
    "normalize": "squad",
    "stop": ["\n"],
    "max_tokens": 4,
    "beam": 2,
}
ITEM = {
    "question": " what? ", "a": {"b": "x"}, "rest": "a text", "where": 3, "options": ["Yes", "No"],
    "right": "y", "names": ["y", "n"], "turns": {"q": ["one", "two"], "a": ["1", "2"]},
}  # fmt: skip
SUITE = {
    "about": "a suite",
    "tasks": ["choice", "open.yaml"],
    "shots": [0, 1, "few"],
    "averages": {"all": ["choice", "open/f1"]},
    "overall": ["all"],
    "published": [{"model": "GLaM", "of": "all", "few": 3.0}],
}


PACKED = {
    "sources": {
        "gzip": {"kind": "jsonl", "path": "words.jsonl.gz", "weight": 1},
        "zstd": {"kind": "text", "path": "lines.txt.zst", "weight": 1, "separator": "line"},
        "records": {"kind": "array_record", "path": "words.array_record", "weight": 1},
    }
}
PROMPT = {"prompt": {"text": "a prompt", "toxicity": 0.5}}
CLASSIFIER = {"bias": -3.0, "weights": {"word": 1.5}}
TERMS = {"about": "x", "groups": {"g": {"prompts": ["{term} was very"], "terms": ["He", "She"]}}}


def lines(*records):
    return "".join(json.dumps(each) + "\n" for each in records)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good file of every kind but those of runs, deep below a folder of its own."""
    folder = tmp_path_factory.mktemp("outside") / "a" / "b" / "place"
    folder.mkdir(parents=True)
    for name, content in {
        "recipe": RECIPE, "mixture": MIXTURE, "choice": CHOICE, "open": OPEN, "suite": SUITE,
        "packed": {**RECIPE, "data": {**RECIPE["data"], "mixture": "./packed_mixture.yaml"}},
        "packed_mixture": PACKED, "terms": TERMS,
    }.items():  # fmt: skip
        (folder / f"{name}.yaml").write_text(as_yaml(content))
    (folder / "items.jsonl").write_text(lines(*({**ITEM, "question": f"{i}?"} for i in range(4))))
    texts = [{**DOCUMENT, "text": f"document {i} of words" * 9} for i in range(20)]
    (folder / "words.jsonl").write_text(lines(*texts))
    (folder / "lines.txt").write_text("a line of text\n" * 40)
    (folder / "words.jsonl.gz").write_bytes(gzip.compress((folder / "words.jsonl").read_bytes()))
    (folder / "lines.txt.zst").write_bytes(zstandard.compress((folder / "lines.txt").read_bytes()))
    writer = ArrayRecordWriter(str(folder / "words.array_record"), "group_size:1")
    for each in texts:
        writer.write(json.dumps(each).encode())
    writer.close()
    (folder / "prompts.jsonl").write_text(lines(PROMPT, PROMPT))
    (folder / "classifier.json").write_text(json.dumps(CLASSIFIER))
    (folder / "adjectives.txt").write_text("good\nbad\n")
    shutil.copy(CHIPS_FILE, folder / "chips.toml")
    train_sentencepiece(["some words to learn, and more words"] * 9, 280, folder / "pieces.model")
    return folder


# The first batch of tries is in the default suite.
BATCHES, TRIES, FEW_TRIES = 4, 60, 6
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, BATCHES))]


TOXICITY = ("eval", "toxicity", "none", "--prompts", "prompts.jsonl", "--classifier",
            "classifier.json")  # fmt: skip
COOCCURRENCE = ("eval", "cooccurrence", "none", "--terms", "terms.yaml", "--words",
                "adjectives.txt")  # fmt: skip
STRUCTURED = {
    "recipe": ("recipe.yaml", RECIPE, ("recipe", "show", "./recipe.yaml", "--origins")),
    "mixture": ("mixture.yaml", MIXTURE, ("data", "show", "./recipe.yaml")),
    "choice": ("choice.yaml", CHOICE, ("eval", "data", "suite.yaml", "--offline")),
    "open": ("open.yaml", OPEN, ("eval", "data", "suite.yaml", "--offline")),
    "suite": ("suite.yaml", SUITE, ("eval", "data", "suite.yaml", "--offline", "--preset", "gpt3")),
    "item": ("items.jsonl", ITEM, ("eval", "data", "suite.yaml", "--offline")),
    "document": ("words.jsonl", DOCUMENT, ("data", "show", "./recipe.yaml")),
    "prompt": ("prompts.jsonl", PROMPT, TOXICITY),
    "classifier": ("classifier.json", CLASSIFIER, TOXICITY),
    "terms": ("terms.yaml", TERMS, COOCCURRENCE),
}


@pytest.fixture
def at(place, monkeypatch):
    """The place, as the current folder; whatever a test does to a file of it is undone."""
    monkeypatch.chdir(place)
    before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    outside = place.parents[2]
    yield place
    shutil.rmtree(place / "cache", ignore_errors=True)
    for path, content in before.items():
        remove(path)
        path.write_bytes(content)
    assert {path.relative_to(outside) for path in outside.rglob("*") if path not in before} <= {
        Path("a"), Path("a/b"), Path("a/b/place"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", STRUCTURED)
def test_the_files_are_good_before_anything_happens_to_them(glam, at, kind):
    command = STRUCTURED[kind][2]
    # Files are read before the run is looked for, which is not there.
    assert check(glam, command, "nothing") == (4 if "none" in command else 0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", STRUCTURED)
def test_one_changed_meaning_is_an_answer_or_an_error(glam, at, kind, seed):
    name, good, command = STRUCTURED[kind]
    rng = random.Random(f"{kind} {seed}")
    for number in range(TRIES if seed else FEW_TRIES):
        text = (as_yaml if name.endswith("yaml") else as_json)(*changed(good, rng))
        (at / name).write_text(text + "\n")
        shutil.rmtree(at / "cache", ignore_errors=True)
        check(glam, command, (seed, number, text[:1500]))


FILES = {
    **{name: command for name, _, command in STRUCTURED.values()},
    "pieces.model": ("tokenizer", "show", "pieces.model", "some words"),
    "lines.txt": ("data", "show", "./recipe.yaml"),
    **dict.fromkeys(
        ("words.jsonl.gz", "lines.txt.zst", "words.array_record"), ("data", "show", "./packed.yaml")
    ),
    "adjectives.txt": COOCCURRENCE,
    "chips.toml": ("plan", "test-tiny", "--target", "v4-none", "--chips", "chips.toml"),
}


@pytest.mark.parametrize("name", ["lines.txt", "words.jsonl.gz", "pieces.model"])
def test_the_other_files_are_good_as_well(glam, at, name):
    assert check(glam, FILES[name], "nothing") == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_are_an_answer_or_an_error(glam, at, name, seed):
    good = (at / name).read_bytes()
    rng = random.Random(f"{name} {seed}")
    for number in range(TRIES if seed else FEW_TRIES):
        data = damaged(good, rng)
        (at / name).write_bytes(data)
        shutil.rmtree(at / "cache", ignore_errors=True)
        check(glam, FILES[name], (seed, number, data[:500]))


@pytest.mark.parametrize(
    "by",
    [each if each == "pipe" else pytest.param(each, marks=pytest.mark.slow) for each in SPECIAL],
)
@pytest.mark.parametrize("name", FILES)
def test_what_stands_in_place_of_a_file_is_an_answer_or_an_error(glam, at, name, by):
    replace(at / name, by)
    check(glam, FILES[name], by)
