"""Names and texts of others on the screen and in HTML: no control characters, no markup."""

import io
import json

import pytest
from rich.console import Console

from cli.run_folder import make_run
from glamcli.cli import render
from glamcli.errors import printable
from glamcli.evals.results.scores import Average, Measured, Results, Score
from glamcli.evals.results.store import keep_results
from glamcli.progress import Silent

HOSTILE = "\x1b[31m\x07\u202e<script>[red][bold"
SIGNS = ("\x1b", "\x07", "\u202e")
MIXTURE = {
    "sources": {
        "<script>[red][/x]": {
            "kind": "jsonl", "path": "words.jsonl", "weight": 1, "about": "<script>[red]"
        }
    },
    "heldout_frac": 0.1,
}  # fmt: skip
ITEM = {"q": HOSTILE, "o": [HOSTILE + "1", HOSTILE + "2"], "right": 1}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{HOSTILE}.yaml").write_text(
        "extends: test-tiny\nabout: <script>[red][/x]\n"
        "data: {mixture: ./mixture.yaml, cache_dir: ./cache}\n"
    )
    (tmp_path / "mixture.yaml").write_text(json.dumps(MIXTURE))
    texts = [json.dumps({"text": f"{HOSTILE} {number} words"}) for number in range(30)]
    (tmp_path / "words.jsonl").write_text("\n".join(texts))
    task = 'data: {path: items.jsonl}\nprompt: "{q}"\noptions: o\nlabel: right\n'
    (tmp_path / f"{HOSTILE}task.yaml").write_text(task)
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM) + "\n")
    (tmp_path / f"{HOSTILE}.model").write_text("no model")
    return tmp_path


COMMANDS = (
    ("recipe", "check", f"./{HOSTILE}.yaml"),
    ("recipe", "show", f"./{HOSTILE}.yaml", "--origins"),
    ("recipe", "diff", f"./{HOSTILE}.yaml", "test-tiny"),
    ("recipe", "show", f"./{HOSTILE}.yml"),
    ("data", "show", f"./{HOSTILE}.yaml"),
    ("data", "verify", f"./{HOSTILE}.yaml", "--duplicates"),
    ("tokenizer", "show", f"./{HOSTILE}.yaml", HOSTILE),
    ("tokenizer", "show", f"{HOSTILE}.model"),
    ("tokenizer", "train", "mixture.yaml", "--vocab-size", "300", "--out", f"{HOSTILE}.m"),
    ("eval", "data", f"{HOSTILE}task.yaml", "--offline"),
    ("eval", "data", f"{HOSTILE}task.yaml", "--offline", "--data-dir", HOSTILE),
    ("eval", "data", HOSTILE),
    ("eval", "show", HOSTILE),
    ("generate", HOSTILE, "text"),
    (HOSTILE,),
    ("train", f"--{HOSTILE}"),
)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_no_command_shows_a_control_character(glam, place, more):
    told = {}
    for command in COMMANDS:
        _, out, err = glam(*command, *(more if command[0] in ("data", "tokenizer", "eval") else ()))
        assert out + err
        told |= {" ".join(command): out + err for sign in SIGNS if sign in out + err}
    assert not told


def test_results_with_hostile_names_are_shown_without_control_characters(glam, place):
    measured = (Measured(HOSTILE, 0.5, 0.1, {HOSTILE: 0.5}),)
    score = Score(f"{HOSTILE}\nrow", 0, HOSTILE, measured, 3, 0, 0, 0, (HOSTILE,), {}, ())
    average = Average(HOSTILE, HOSTILE, 0.5, 1, (HOSTILE,))
    model = {"step": 3, "run": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    found = Results(HOSTILE, model, (score,), (), (), (average,), HOSTILE)
    path = keep_results(found, place / "run", Silent())
    code, out, err = glam("eval", "show", path)
    assert code == 0, err
    assert not [sign for sign in SIGNS if sign in out + err]
    assert "<script>[red][bold\\nrow" in out


def test_a_terminal_takes_no_name_for_markup():
    screen = io.StringIO()
    live = render.Live(Console(file=screen, force_terminal=True, width=100, highlight=False))
    with live.phase(f"preparing [/x][red]{HOSTILE}", 2, "[/x]") as phase:
        phase.note(f"[/x][red]{HOSTILE}")
        phase.advance(1)
        live._bars.refresh()
        live.warn(HOSTILE)
    shown = screen.getvalue()
    assert "[/x][red]\\x1b[31m\\x07\\u202e<script>" in shown
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown


@pytest.mark.slow
def test_the_page_of_a_plan_has_no_markup_of_others(glam, place):
    code, out, err = glam("plan", f"./{HOSTILE}.yaml", "--target", "v4-16", "--html", "page.html")
    assert code == 0, err
    assert not [sign for sign in SIGNS if sign in out + err]
    page = (place / "page.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page


@pytest.mark.slow
def test_what_a_run_shows_of_hostile_texts(glam, place):
    (place / "corpus").mkdir()
    run = make_run(place / "corpus")
    items = (f"{HOSTILE}task.yaml", "--shots", "0")
    for command in (
        ("eval", run, "--suite", *items),
        ("eval", run, "--suite", *items, "--explain", "0"),
        ("eval", "overlap", run, "--suite", f"{HOSTILE}task.yaml"),
        ("generate", run, HOSTILE, "--tokens", "2", "--json"),
    ):
        code, out, err = glam(*command)
        assert code == 0, err
        assert not [sign for sign in SIGNS if sign in out + err], out + err


def test_spaces_and_joiners_of_names_are_shown_and_what_turns_text_around_is_escaped():
    names = "10\u00a0% \u3000\u202f\u2009 \u0645\u06cc\u200c \U0001f469\u200d\U0001f4bb \n"
    assert printable(names) == names
    assert printable("\u202e\u2066\u200e\u200f\u2028\u061c\x7f\x85\x1b\t\ud800") == (
        r"\u202e\u2066\u200e\u200f\u2028\u061c\x7f\x85\x1b\t\ud800"
    )


def test_the_page_of_a_run_has_no_markup_of_others(glam, place):
    run = place / f"{HOSTILE}run"
    run.mkdir()
    line = {"step": 1, "loss": 1.0, f"loss/{HOSTILE}": 2.0, f"heldout/{HOSTILE}": 2.0, HOSTILE: 3.0}
    line |= {f"eval/{HOSTILE}/</script>/0_shots": 0.5, "alarms": [HOSTILE], 'memory_"onload=x': 1.0}
    (run / "metrics.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps(line | {"step": 2}) + "\n"
    )
    (run / "run.json").write_text(json.dumps({"recipe": {HOSTILE: HOSTILE}, "topology": HOSTILE}))
    code, out, err = glam("report", run, run, "-o", "page.html")
    assert code == 0, err
    assert not [sign for sign in SIGNS if sign in out + err]
    page = (place / "page.html").read_text()
    assert "&lt;script&gt;" in page
    assert page.count("<script") == page.count("</script") == 2  # the data, and what draws it
    assert '"onload' not in page.partition("<script")[0]
    assert not [sign for sign in SIGNS if sign in page]
