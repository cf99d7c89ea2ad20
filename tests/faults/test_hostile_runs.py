"""Files of a run folder made hostile: every command on the run succeeds, or says what is wrong."""

import json
import random
import shutil

import pytest

from faults.hostile_inputs import check
from faults.test_hostile_records import tried

SETTINGS = {
    "train.steps": 3, "every.checkpoint_steps": 2, "every.log_steps": 1, "model.num_layers": 2,
    "every.heldout_steps": 2, "data.mixture": "./mixture.yaml",
    "data.cache_dir": "./cache", "data.tokenizer.kind": "sentencepiece", "model.vocab_size": 300,
    "runtime.compile_cache": "false", "checkpoints.retry_seconds": 0,
}  # fmt: skip
TASK = 'data: {path: items.jsonl}\nprompt: "{q}"\noptions: o\nlabel: right\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, its corpus, and a run of it of three steps."""
    from glamcli.cli import main

    folder = tmp_path_factory.mktemp("place")
    (folder / "words.txt").write_text(
        "".join(f"line {number} of many words, {number * number}\n" for number in range(99))
    )
    (folder / "mixture.yaml").write_text(
        "sources: {words: {kind: text, path: words.txt, separator: line, weight: 1}}\n"
        "heldout_frac: 0.2\n"
    )
    (folder / "task.yaml").write_text(TASK)
    (folder / "items.jsonl").write_text('{"q": "a", "o": ["b", "c"], "right": 1}\n' * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            main.run(train())
    assert not ended.value.code
    rewound = {"unix_seconds": 1.0, "from_step": 3, "to_step": 2, "skip_batches": 1, "reason": "x"}
    (folder / "run" / "rewinds.jsonl").write_text(json.dumps({**rewound, "set_aside": {}}) + "\n")
    return folder


def train(*more):
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return ["train", "test-tiny", "--run", "run", *sets, *more]


COMMANDS = {
    "train": train(),
    "train more": train("--set", "train.steps=4"),
    "generate": ["generate", "run", "line", "--tokens", "1"],
    "eval": ["eval", "run", "--suite", "task.yaml", "--shots", "0"],
    "show": ["recipe", "show", "./run"],
    "list": ["checkpoint", "list", "run"],
    "verify": ["checkpoint", "verify", "run"],
    "diff": ["checkpoint", "diff", "run/checkpoints/2", "run"],
    "report": ["report", "run", "run", "-o", "page.html"],
    "rewind": ["checkpoint", "rewind", "run", "--to", "2"],
    "overlap": ["eval", "overlap", "run", "--suite", "task.yaml"],
}
LIGHT = ("show", "overlap", "report", "list", "verify", "rewind")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_on_a_run_with_a_hostile_file(glam, place, tmp_path, monkeypatch, name):
    shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    command = COMMANDS[name]
    if name != "train more":
        assert check(glam, command, "nothing") == 0
    rng = random.Random(name)
    for number in range(30 if name in LIGHT else 10):
        tried(glam, tmp_path / "place" / "run", rng, number, command)
        shutil.rmtree("run")
        shutil.copytree(place / "run", "run")
