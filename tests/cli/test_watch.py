"""`glam watch`: a page of every width, of every state of a run, until Ctrl-C."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from contextlib import contextmanager, suppress

import pytest

from glamcli.cli.watch import run_page, sparkline
from glamcli.config.dump import dump
from glamcli.config.load import load_recipe
from glamcli.train.watching import WatchedRun

NOW = 1_000_000_060.0
LINE = {
    "step": 50,
    "tokens_seen": 12_800,
    "unix_seconds": NOW - 60,
    "loss": 4.25,
    "perplexity": 70.1,
    "learning_rate": 0.03,
    "grad_norm": 1.5,
    "bad_steps_total": 2,
    "seconds_left": 100.0,
    "tokens_per_second": 2466.1,
    "seconds_per_step": 0.831,
    "mfu": 0.413,
    "goodput": 0.92,
    "memory/process_bytes": 3 * 2**30,
    "memory/device_bytes": 21.5 * 2**30,
    "memory/device_peak_bytes": 2**35,
    "max_first_frac": 0.051,
    "router_entropy_nats": 2.9,
    "balance": 1.04,
    "dropped_first_frac": 0.01,
    "dropped_second_frac": 0.3,
    "dead_experts": 3,
    "router_alarms": 1,
}
ALARM = (
    "expert layer 2: the most popular expert of 64 gets 90% of first choices, in the mean of "
    "steps; raise `moe.balance_coef` (now 0.01); the limit is `guard.routers.first_frac` (0.5)"
)
WIDE = """\
runs/mine  stopped
to go on  glam train runs/mine
steps     ███████████████░░░░░░░░░░░░░░░  50/100  50.0%  12,800 tokens
          newest line 1:00 ago
loss      █▁  4.2500  perplexity 70.1
event     step 50: expert layer 2: the most popular expert of 64 gets 90% of
          first choices, in the mean of steps; raise `moe.balance_coef` (now
          0.01); the limit is `guard.routers.first_frac` (0.5)
held-out  web 4.3  books 4.5  (step 50)
optimizer rate 0.03  gradient norm 1.5  skipped 2
routers   top expert 5.1%  entropy 2.90 nats  balance 1.04  first drops 1.0%
          second drops 30.0%  dead experts 3  alarms 1
speed     2,466 tokens/s  0.831 s/step  MFU 41.3%  goodput 92.0%
memory    device 21.50 GiB  most 32.00 GiB  process 3.00 GiB
scores    arc/accuracy/0_shots 0.512  (step 50)"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/mine"
    folder.mkdir(parents=True)
    recipe = load_recipe("test-tiny", ["train.steps=100"]).recipe
    (folder / "recipe.yaml").write_text(dump(recipe))
    write(
        folder,
        {"step": 1, "loss": 8.0},
        LINE,
        {"step": 50, "alarms": [ALARM]},
        {"step": 50, "heldout/web": 4.3, "heldout/books": 4.5, "unigram/web": 6.0},
        {"step": 50, "eval/arc/accuracy/0_shots": 0.512},
    )
    return folder


def write(folder, *lines):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def drawn(folder, width):
    watched = WatchedRun(folder.relative_to(folder.parents[1]))
    watched.refresh()
    return run_page(watched, width, NOW)


def test_everything_is_on_a_page_of_80_columns(run):
    assert "\n".join(drawn(run, 80)) == WIDE


@pytest.mark.parametrize("width", [1, 9, 10, 11])
def test_a_terminal_too_narrow_for_a_page_gets_one(run, width):
    assert drawn(run, width)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("run12", "glam train ./run12"),
        ("my  run", "glam train './my  run'"),
        ("runs/" + "long" * 20, "glam train runs/" + "long" * 20),
    ],
)
def test_the_command_to_go_on_can_be_pasted(run, name, command):
    folder = run.rename(run.parents[1] / name)
    watched = WatchedRun(folder.relative_to(run.parents[1]))
    watched.refresh()
    assert f"to go on  {command}" in run_page(watched, 40, NOW)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_page_is_never_wider_and_nothing_is_left_out(run, width):
    lines = drawn(run, width)
    assert max(map(len, lines)) <= width
    words = {word for line in lines for word in line.split() if not set(word) & set("█░▁")}
    assert words == {word for word in WIDE.split() if not set(word) & set("█░▁")}


def test_what_files_say_is_shown_escaped_and_cut(run):
    hostile = {
        "heldout/\x1b[2J\n[red]\u202e": 1.0,
        "heldout/" + "名" * 100: 2.0,
        **{f"eval/{number}": 0.5 for number in range(1000)},
        "goodput": 10**400,
        "mfu": [1],
        "alarms": ["\x1b]0;x\x07" + "a b" * 9999, 5, None],
    }
    write(run, {"step": 51, **hostile}, {"step": -(10**300)}, {"step": 10**300})
    for width in (40, 80):
        lines = drawn(run, width)
        text = "\n".join(lines)
        assert len(lines) < 60
        assert all(char.isprintable() or char == "\n" for char in text)
        assert "\\x1b[2J\\n[red]" in text
        for line in lines:
            wide = sum(unicodedata.east_asian_width(char) in "WF" for char in line)
            assert len(line) + wide <= width


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_name_is_cut_before_its_number(run, width):
    scores = {f"eval/{name}/accuracy/{shots}_shots": 0.125 * (shots + 1)
              for name in ("a_task_with_a_long_name", "名" * 40) for shots in (0, 1)}  # fmt: skip
    errors = {name + "_stderr": 0.0512 for name in scores}
    write(run, {"step": 60, "eval/failed_tasks": 0, **scores, **errors})
    lines = drawn(run, width)
    shown = " ".join(lines[next(i for i, line in enumerate(lines) if "scores" in line) :])
    for score in ("0_shots 0.125", "1_shots 0.25"):
        assert shown.count(score) == 2
    assert shown.count("0.25 ± 0.051") == (width == 80)  # where the name fits as well
    assert "stderr" not in shown
    assert "failed" not in shown
    write(run, {"step": 61, "eval/failed_tasks": 2})
    assert "failed_tasks 2" in " ".join(drawn(run, width))


def test_what_is_not_finite_is_said_and_no_older_number_shown(run):
    null = dict.fromkeys(("loss", "perplexity", "grad_norm", "seconds_left", "heldout/web"))
    write(run, {"step": 51, **null})
    shown = " ".join(drawn(run, 80))
    for text in ("█▁  not finite  perplexity nan", "gradient norm nan", "web nan  (step 51)"):
        assert text in shown


def test_without_a_terminal_it_is_printed_once(run, glam):
    code, out, err = glam("watch", "runs/mine")
    assert (code, err) == (0, "")
    assert out.startswith("runs/mine  stopped\nto go on  glam train runs/mine\nsteps     █")
    assert glam("watch", "runs/mine", "--once")[0] == 0


def test_what_is_no_run_is_an_error_when_it_is_shown_once(run, glam):
    assert glam("watch", "runs/nine", "--once") == (
        4,
        "",
        "error: runs/nine is no folder\nhint: give the folder of a run, such as runs/quickstart\n",
    )
    code, _, err = glam("watch", ".")
    assert (code, err.splitlines()[0]) == (4, "error: . has no sign of a run")


def test_a_sparkline_is_of_means_from_lowest_to_highest():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 2, 8, 8], 2) == "▁█"
    assert sparkline([3.0, 3.0], 40) == "▁▁"


@contextmanager
def watching(folder, term):
    """`glam watch` in a terminal of this kind, and what it draws there."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from glamcli.cli.main import run; run()"]
    size = {"COLUMNS": "80", "LINES": "40", "TERM": term}
    with subprocess.Popen(
        [*command, "watch", folder],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        env={**os.environ, **size},
        start_new_session=True,
    ) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
    os.close(ours)


def test_it_draws_again_until_ctrl_c_also_when_the_run_is_deleted(run):
    with watching("runs/mine", "xterm") as (process, terminal):
        shows(terminal, "50/100")
        write(run, {"step": 60, "loss": 3.0})
        shows(terminal, "60/100")
        shutil.rmtree(run)
        shows(terminal, "is no folder")
        process.send_signal(signal.SIGINT)
        assert ended(process, terminal) == 0


@pytest.mark.parametrize(
    ("folder", "term", "shown", "code"),
    [("runs/mine", "dumb", "50/100", 0), ("runs/nine", "xterm", "runs/nine is no folder", 4)],
)
def test_in_a_terminal_it_ends_where_it_cannot_draw_or_there_is_no_run(
    run, folder, term, shown, code
):
    with watching(folder, term) as (process, terminal):
        shows(terminal, shown)
        assert ended(process, terminal) == code


def ended(process, terminal):
    """The exit code, reading what is drawn until then: a full terminal would hold the end up."""
    until = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < until:
        if select.select([terminal], [], [], 0.1)[0]:
            with suppress(OSError):
                os.read(terminal, 10_000)
    return process.poll()


def shows(terminal, text):
    """Waits until this is drawn."""
    drawn, until = b"", time.monotonic() + 30
    while text.encode() not in drawn:
        assert time.monotonic() < until, drawn
        if select.select([terminal], [], [], 0.1)[0]:
            drawn += os.read(terminal, 10_000)
