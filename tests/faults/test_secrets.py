"""Credentials in addresses, settings and the environment are not in what is written or shown."""

import json

import fsspec
import pytest

CANARY = "CANARY"
USER, QUERY = f"me:{CANARY}1@", f"?sig={CANARY}2&token={CANARY}3"
ADDRESS = f"memory://{USER}bucket/words.jsonl"
PAGE = f"https://{USER}example.org/page{QUERY}"
RECIPE = f"""
extends: test-tiny
about: from {PAGE}
data: {{mixture: ./mixture.yaml}}
train: {{steps: 2}}
every: {{checkpoint_steps: 2, heldout_steps: 2, eval_steps: 2}}
eval: {{suite: ./task.yaml, limit: 2, shots: [0]}}
model: {{num_layers: 2}}
"""
MIXTURE = f"""
about: from {PAGE}
sources:
  words: {{kind: jsonl, path: "{ADDRESS}", about: "{PAGE}", weight: 1}}
heldout_frac: 0.2
"""
TASK = f"""
about: from {PAGE}
data: {{path: items.jsonl}}
prompt: "{{q}}"
options: o
label: right
origin:
  page: {PAGE}
  note: {PAGE}
  licence: {PAGE}
  files: [{{name: items.jsonl, url: "{PAGE}", shape: jsonl, to: items.jsonl}}]
"""
SETTINGS_AND_DATA = (
    "recipe check ./my.yaml", "recipe show ./my.yaml --origins", "recipe show ./my.yaml --json",
    "recipe diff ./my.yaml test-tiny", "recipe diff ./my.yaml test-tiny --json",
    "recipe new mine --from ./my.yaml", "data prepare ./my.yaml", "data prepare ./my.yaml --json",
    "data show ./my.yaml", "data verify ./my.yaml --duplicates --json",
    "tokenizer show ./my.yaml words",
    "tokenizer train mixture.yaml --vocab-size 300 --out a.model",
    "eval data task.yaml --offline", "eval data task.yaml --offline --json",
)  # fmt: skip
RUNS = (
    "train ./my.yaml --run run", "train ./my.yaml --run run --set train.steps=3 --json",
    "checkpoint list run", "checkpoint list run --json", "checkpoint verify run",
    "recipe show ./run", "generate run line --tokens 2",
    "eval run --suite task.yaml --shots 0", "eval show run --suite task",
    "eval show run --suite task --json",
    "eval overlap run --suite task.yaml", "eval overlap mixture.yaml --suite task.yaml",
    "plan ./my.yaml --target v4-16 --html page.html", "doctor", "doctor --json",
)  # fmt: skip
WRONG = (
    "eval data task.yaml --offline --data-dir nothing",
    "eval data task.yaml --offline --data-dir nothing --json",
    "data prepare ./my.yaml --set data.mixture=./gone.yaml", f"eval run --suite {PAGE}",
    f"recipe show ./my.yaml --set data.mixture={PAGE}", f"recipe show {PAGE}",
    f"data prepare ./my.yaml --set data.cache_dir={PAGE}", f"generate {PAGE}",
    f"train ./my.yaml --run {PAGE}", f"train ./my.yaml --set eval.suite={PAGE}",
    f"train ./my.yaml --set data.tokenizer.path={PAGE} --set data.tokenizer.kind=sentencepiece",
    f"generate {PAGE}/{PAGE}", f"eval show {PAGE}", f"tokenizer show {PAGE} words",
)  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    disk = fsspec.filesystem("memory")
    texts = [json.dumps({"text": f"line {number} of many words"}) for number in range(60)]
    url = fsspec.core.url_to_fs(ADDRESS)[1]
    disk.pipe(url, "\n".join(texts).encode())
    for name, content in {"my": RECIPE, "mixture": MIXTURE, "task": TASK}.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    gone = MIXTURE.replace("words.jsonl", f"gone.jsonl{QUERY}")
    (tmp_path / "gone.yaml").write_text(gone)
    (tmp_path / "items.jsonl").write_text('{"q": "a", "o": ["b", "c"], "right": 1}\n' * 2)
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "GLAM_SECRET"):
        monkeypatch.setenv(name, f"{CANARY}4")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    disk.rm(url)


def run(glam, place, commands):
    """The exit codes of the commands, once nothing they showed or wrote has a credential in it."""
    given = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    codes, told = {}, {}
    for command in commands:
        codes[command], out, err = glam(*command.split(" "))
        if leaks := [line[:300] for line in (out + err).splitlines() if CANARY in line]:
            told[command] = leaks
    assert not told, json.dumps(told, indent=1)
    written = [path for path in place.rglob("*") if path.is_file() and path not in given]
    assert not [str(path) for path in written if CANARY.encode() in path.read_bytes()]
    assert not [str(path) for path in place.rglob("*") if CANARY in path.name]
    return codes


def test_settings_and_data(glam, place):
    codes = run(glam, place, SETTINGS_AND_DATA)
    assert set(codes.values()) == {0}, codes
    assert list((place / "cache").rglob("rows.json"))


def test_errors(glam, place):
    codes = run(glam, place, WRONG)
    assert set(codes.values()) == {2, 3}, codes


@pytest.mark.slow
def test_runs(glam, place):
    codes = run(glam, place, RUNS)
    failed = {command: code for command, code in codes.items() if code}
    assert not failed
    assert (place / "page.html").is_file()
