"""`glam tokenizer` as a person meets it."""

import json
from pathlib import Path

import pytest

RECIPE = """
extends: test-tiny
data: {mixture: ./mix.yaml, cache_dir: ./cache, tokenizer: {kind: sentencepiece}}
"""
MIXTURE = """
sources:
  web: {kind: text, path: web.txt, separator: line, weight: 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "mix.yaml").write_text(MIXTURE)
    lines = [f"{i} " + " ".join(f"w{i * j % 97}x{j}" for j in range(40)) for i in range(200)]
    (tmp_path / "web.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_trains_into_the_cache_and_shows_the_same_tokenizer(folder, glam):
    code, out, _ = glam("tokenizer", "train", "my.yaml", "--vocab-size", "300", "--json")
    assert code == 0
    facts = json.loads(out.splitlines()[-1])
    assert facts["vocab_size"] == 300
    assert Path(facts["file"]).parent == folder / "cache" / "tokenizers"
    sets = ("--set", "data.tokenizer.train_vocab_size=300")
    code, out, err = glam("tokenizer", "show", "my.yaml", *sets)
    assert code == 0
    assert facts["sha256"] in out
    assert "training" not in err


def test_a_mixture_trains_into_a_file_that_show_reads(folder, glam):
    code, out, err = glam(
        "tokenizer", "train", "mix.yaml", "--vocab-size", "300", "--out", "a.model"
    )
    assert code == 0, err
    assert "vocab_size  300" in out
    assert "data.tokenizer.path=a.model" in err
    code, out, err = glam("tokenizer", "show", "a.model", "w1 \x1b[31m", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert facts["bytes"] == 8
    assert len(facts["ids"]) == len(facts["pieces"])
    assert "\x1b" not in "".join(facts["pieces"])
    code, out, _ = glam("tokenizer", "show", "a.model", "w1 w2")
    assert "bytes per token" in out


def test_a_mixture_alone_does_not_say_how_many_pieces(folder, glam):
    code, _, err = glam("tokenizer", "train", "mix.yaml")
    assert code == 2
    assert "give `--vocab-size` and `--out`" in err


def test_a_file_in_the_place_of_the_cache_folder_is_named(folder, glam):
    (folder / "cache").write_text("")
    code, _, err = glam("tokenizer", "train", "my.yaml", "--vocab-size", "300")
    assert code == 3
    assert f"the cache folder {folder / 'cache'} cannot be written: " in err
    assert "`data.cache_dir`" in err
    code, _, err = glam(
        "tokenizer", "train", "mix.yaml", *("--vocab-size", "300"), *("--out", "mix.yaml/a.model")
    )
    assert code == 3
    assert "cannot be written" in err


def test_bytes_are_not_trained(folder, glam):
    code, _, err = glam("tokenizer", "train", "my.yaml", "--set", "data.tokenizer.kind=bytes")
    assert code == 2
    assert "plain bytes" in err


def test_too_many_pieces_exit_with_what_is_possible(folder, glam):
    code, _, err = glam(
        "tokenizer", "train", "mix.yaml", "--vocab-size", "100000", "--out", "a.model"
    )
    assert code == 3
    assert "hint: use" in err
    assert not (folder / "a.model").exists()
