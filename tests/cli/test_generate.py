"""`glam generate` as a person meets it."""

import io
import json
import shutil
from functools import partial

import pytest

from cli.run_folder import make_run
from glamcli.beam_search import Hypothesis
from glamcli.cli import generate
from glamcli.generate import Generator
from glamcli.hosts.watchdog import Watchdog


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def glam(glam):
    """Runs `glam generate`."""
    return partial(glam, "generate")


@pytest.fixture
def scripted(monkeypatch):
    """A generator that says what it was asked instead of running the model."""

    class Scripted:
        continuations = Generator.continuations

        def __init__(self, decoder, params, tokenizer):
            assert decoder.eval_dispatch == "dropless"

        def encode(self, prompt):
            return [2, *prompt.encode()]

        def texts(self, prompt, sampling, *, tokens, samples, seed):
            return [f"/{sampling.temperature}/{tokens}/{seed + i}" for i in range(samples)]

        def stream(self, prompt, sampling, *, tokens, seed):
            yield 0, "/streamed"
            yield 0, f"/{tokens}"

        def beams(self, prompts, *, width, tokens, alpha):
            return [[Hypothesis(f"/beam {i}", (), (), -i, True) for i in range(width)]]

    monkeypatch.setattr("glamcli.trained.Generator", Scripted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_run_outlives_its_corpora_mixture_and_cache(glam, tmp_path, kind):
    run = make_run(tmp_path, "model.vocab_size=300", f"data.tokenizer.kind={kind}")
    before = glam(run, "stone ", "--tokens", "5", "--seed", "4")
    shutil.rmtree(tmp_path / "cache")
    for name in ("corpus.txt", "mixture.yaml"):
        (tmp_path / name).unlink()
    assert before[0] == 0
    assert glam(run, "stone ", "--tokens", "5", "--seed", "4")[:2] == before[:2]
    if kind == "sentencepiece":
        (run / "tokenizer.model").write_bytes(b"damaged")
        code, _, err = glam(run, "stone ")
        assert code == 2
        assert "mixture" in err


def test_a_model_continues_the_prompt(glam, run):
    code, out, _ = glam(run, "stone ", "--tokens", "12", "--seed", "4")
    assert code == 0
    assert out.startswith("stone ")
    assert len(out.encode()) > len("stone \n")


@pytest.mark.parametrize("how", [(), ("--samples", "3"), ("--beam", "2")])
def test_every_token_is_progress_for_the_watchdog(glam, run, monkeypatch, how):
    beats = []
    monkeypatch.setattr(Watchdog, "beat", lambda dog, where, times=1: beats.append(where))
    assert glam(run, "stone ", "--tokens", "9", *how)[0] == 0
    assert 5 < beats.count("generating") <= 1 + 9


def test_json_has_one_object_per_sample(glam, run, scripted):
    code, out, _ = glam(run, "stone", "--tokens", "6", "--samples", "2", "--seed", "7", "--json")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines() if '"prompt"' in line]
    assert found == [
        {"prompt": "stone", "sample": 0, "text": "/0.8/6/7"},
        {"prompt": "stone", "sample": 1, "text": "/0.8/6/8"},
    ]


def test_beams_come_best_first_with_their_number(glam, run, scripted):
    code, out, _ = glam(run, "stone", "--beam", "3", "--samples", "2")
    assert code == 0
    assert out == "--- 1\nstone/beam 0\n--- 2\nstone/beam 1\n"


def test_every_line_of_a_pipe_is_a_prompt(glam, run, scripted, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("stone\nstück\n".encode()), encoding="ascii")
    monkeypatch.setattr("sys.stdin", stdin)
    code, out, _ = glam(run, "--tokens", "3", "--json")
    assert code == 0
    found = [json.loads(line)["prompt"] for line in out.splitlines() if '"prompt"' in line]
    assert found == ["stone", "stück"]


def test_a_line_that_is_not_utf8_is_refused_with_its_number(glam, run, scripted, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("stück\nri\xffver\n".encode("latin-1")), "utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    code, out, err = glam(run, "--tokens", "3", "--json")
    assert code == 2
    assert '"prompt"' not in out
    assert "line 1 of standard input is not UTF-8" in err


def test_a_prompt_reaches_the_model_whatever_the_locale(glam, run, scripted):
    undecoded = "stück".encode().decode("ascii", "surrogateescape")  # as with LC_ALL=C
    code, out, _ = glam(run, undecoded, "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["prompt"] == "stück"
    code, _, err = glam(run, b"st\xfcck".decode("utf-8", "surrogateescape"))
    assert code == 2
    assert "PROMPT is not UTF-8" in err


def test_lines_typed_are_prompts_until_the_end(glam, run, scripted, monkeypatch):
    class Typed(io.StringIO):
        def isatty(self):
            return True

    lines = iter(["stone", "", "river"])

    def typed(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("sys.stdin", Typed())
    monkeypatch.setattr("builtins.input", typed)
    code, out, err = glam(run, "--tokens", "3")
    assert code == 0
    assert "Ctrl-D" in err
    assert out == "stone/streamed/3\nriver/streamed/3\n"


def test_terminals_are_shown_control_characters_escaped(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    generate._write("a\x1b[2J\nb")
    assert capsys.readouterr().out == "a\\x1b[2J\nb"
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    generate._write("a\x1b")
    assert capsys.readouterr().out == "a\x1b"


def test_more_tokens_than_a_row_are_warned_about(glam, run, scripted):
    _, _, err = glam(run, "stone", "--tokens", "130", "--temperature", "0")
    assert "more than the 128" in err


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["nowhere", "x"], 4, "no run folder or checkpoint nowhere"),
        # Refused before the run is looked for.
        (["nowhere", "x", "--top-p", "2"], 2, "invalid value for `--top-p`: 2.0 is not in"),
        (["nowhere", "x", "--top-p", "nan"], 2, "invalid value for `--top-p`: nan is not a finite"),
        (["nowhere", "x", "--top-k", "0"], 2, "invalid value for `--top-k`"),
        (["nowhere", "x", "--temperature", "inf"], 2, "invalid value for `--temperature`"),
        (["RUN", "x", "--tokens", "0"], 2, "--tokens"),
        (["RUN", "x", "--beam", "2", "--samples", "3"], 2, "raise `beam`"),
        (["RUN", "x", "--beam", "100000"], 2, "invalid value for `--beam`: 100000 is not in"),
        (["https://h/run", "x"], 2, "a run folder cannot be a URL: https://h/run"),
        (["GS:/b/run", "x"], 2, "hint: did you mean `gs://b/run`?"),
        (["gs://b/", "x"], 2, "a run cannot be a whole bucket: gs://b/\nhint: name a folder in it"),
    ],
)
def test_mistakes_are_told_in_a_line(glam, run, args, code, reason):
    found, out, err = glam(*[run if arg == "RUN" else arg for arg in args])
    assert found == code
    assert reason in err
    assert out == ""
