"""Progress three ways, and a reader that goes away."""

import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from glamcli.cli.render import JsonLines, Live, Plain, print_table, step_text
from glamcli.progress import duration


def a_run(progress):
    with progress.phase("compiling"):
        pass
    with progress.phase("training", total=2, unit="steps") as bar:
        progress.step({"step": 1, "steps": 2, "loss": 5.25, "tokens_per_second": 1234.5})
        bar.advance()
        with progress.phase("evaluating", total=1, unit="batches") as inner:
            inner.advance()
        progress.say("step 1: held-out loss 3.0")
        progress.warn("expert layer 1: \x1b[31mred")


def test_plain_lines_name_phases_steps_and_warnings():
    stream = io.StringIO()
    a_run(Plain(stream))
    assert stream.getvalue().splitlines() == [
        "compiling ...",
        "compiling: done in 0.0 s",
        "training (2 steps) ...",
        "step 1/2  loss 5.2500  1,234 tokens/s",
        "step 1: held-out loss 3.0",
        "warning: expert layer 1: \\x1b[31mred",
        "training: done in 0.0 s",
    ]


def test_one_of_many_is_called_one(monkeypatch):
    monkeypatch.setattr("glamcli.cli.render.SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    for total, unit in ((1, "runs"), (1, "batches"), (2, "batches"), (None, "sources"), (1, "KB")):
        with Plain(stream).phase("reading", total, unit) as phase:
            phase.advance()
    assert re.findall(r"reading:? \(?([\d/]+ \w+)", stream.getvalue()) == [
        *("1 run", "1/1 run", "1 batch", "1/1 batch", "2 batches", "1/2 batches", "1 source"),
        *("1 KB", "1/1 KB"),
    ]


def test_json_lines_carry_every_event():
    stream = io.StringIO()
    a_run(JsonLines(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == [
        *("phase", "phase", "phase", "step", "phase", "phase", "say", "warn", "phase")
    ]
    assert events[3]["loss"] == 5.25
    assert events[2] == {
        "event": "phase",
        "name": "training",
        "state": "begin",
        "total": 2,
        "unit": "steps",
    }


def test_a_live_terminal_keeps_one_line_per_outer_phase_and_everything_said():
    stream = io.StringIO()
    a_run(Live(Console(file=stream, force_terminal=True, width=80, color_system=None)))
    text = stream.getvalue()
    assert re.search(r"training: \d+\.\d s\n", text)
    assert re.search(r"compiling: \d+\.\d s\n", text)
    assert "evaluating: " not in text
    assert "step 1: held-out loss 3.0\n" in text
    assert "\x1b[31m" not in text


def test_bars_and_counts_stay_in_a_narrow_terminal():
    stream = io.StringIO()
    live = Live(Console(file=stream, force_terminal=True, width=40, color_system=None))
    with live.phase("saving step 1200", total=1234567, unit="KB") as bar:
        bar.advance(600000)
        assert live._bars is not None
        Console(file=stream, width=40).print(live._bars.get_renderable())
    assert "━" in stream.getvalue()
    assert "600,000/1,234,567 KB" in stream.getvalue()


def test_bars_are_gone_when_a_phase_fails():
    live = Live(Console(file=io.StringIO(), force_terminal=True))

    def fail():
        with live.phase("training", total=2, unit="steps"):
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert live._bars is None


def test_a_reader_that_went_away_does_not_end_a_run():
    code = """
import sys, time
from glamcli.cli.render import JsonLines
lines = JsonLines(sys.stdout)
for i in range(3000):
    lines.say("x" * 100)
sys.stderr.write("went on")
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr is not None
    assert writer.stderr.read() == "went on"
    writer.stderr.close()
    assert writer.wait(20) == 0


def test_numbers_of_a_step_in_a_fixed_order_and_only_those_there_are():
    assert step_text({"loss": 2.0}) == "loss 2.0000"
    assert (
        step_text(
            {
                "learning_rate": 0.01,
                "balance": 1.034,
                "dropped_frac": 0.0312,
                "seconds_left": 200.0,
                "tokens_per_second": 12345.0,
                "loss": None,
            }
        )
        == "12,345 tokens/s  3:20 left  dropped 3.1%  balance 1.03x  lr 0.01"
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (8.25, "8.2 s"),
        (42.4, "42 s"),
        (59.99, "60 s"),
        (61, "1:01"),
        (7384, "2:03:04"),
    ],
)
def test_durations_read_well(seconds, expected):
    assert duration(seconds) == expected


def test_a_table_aligns_numbers_and_leaves_control_characters_harmless(capsys):
    print_table(("name", ">score"), [["a [bold]", "1.0"], ["b", "10.0"]], title="t", note="n")
    assert capsys.readouterr().out == ("t\nname     score\na [bold]   1.0\nb         10.0\nn\n")
