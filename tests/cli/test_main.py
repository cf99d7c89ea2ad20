"""The command line as a person meets it: help, mistakes, and every way of ending."""

import os
import subprocess
import sys

import click
import pytest

import glamcli
from glamcli.cli import main
from glamcli.errors import GlamError, TrainError


@pytest.fixture
def failing(monkeypatch):
    """Makes `glam doctor` raise this error."""

    def failing(error):
        @click.command()
        def command():
            raise error

        monkeypatch.setattr(main.LazyGroup, "get_command", lambda self, ctx, name: command)

    return failing


def python(code):
    """Runs code in a fresh interpreter, as installed programs are."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_lists_every_command_and_imports_none_of_them():
    run = python(
        "import sys\nfrom glamcli.cli.main import run\n"
        "try: run(['--help'])\nfinally:\n"
        " assert not {'jax', 'flax', 'rich', 'pydantic', 'numpy'} & set(sys.modules)\n"
        " assert not {m[12:] for m in sys.modules if m.startswith('glamcli.cli.')}"
        " - {'main', 'streams'}"
    )
    assert run.stderr == ""
    assert run.returncode == 0
    for name, text in main.COMMANDS.items():
        assert f"  {name} " in run.stdout
        assert text in run.stdout


def test_without_arguments_the_help_is_shown(glam):
    code, out, err = glam()
    assert (code, err) == (0, "")
    assert "glam train quickstart" in out


def test_version_is_told(glam):
    assert glam("--version") == (0, f"glam {glamcli.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "what", "hint"),
    [
        (["trian"], "no such command: `trian`", "did you mean `glam train`?"),
        (["xyzzy"], "no such command: `xyzzy`", "`glam --help` lists them"),
        (["--versoin"], "no such option: `--versoin`", "did you mean `--version`?"),
        (["train", "--stes=5"], "no such option: `--stes`", "did you mean `--set`?"),
        (["--xyzzy"], "no such option: `--xyzzy`", "`glam --help` lists them"),
        (["recipe", "lst"], "no such command: `lst`", "did you mean `glam recipe list`?"),
        (["launch", "stauts", "x"], "no such command: `stauts`", "did you mean `glam launch sta"),
        (["recipe", "show"], "missing argument `RECIPE`", "see `glam recipe show --help`"),
        (["recipe", "show", "a", "b"], "got unexpected extra argument (b)", "see `glam recipe"),
        (
            ["recipe", "show", "quickstart", "--orgins"],
            "no such option: `--orgins`",
            "did you mean `--origins`?",
        ),
    ],
)
def test_mistyped_commands_get_two_lines(glam, args, what, hint):
    code, out, err = glam(*args)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {what}")
    assert err.splitlines()[1].startswith(f"hint: {hint}")
    assert len(err.splitlines()) == 2


def test_errors_are_told_and_exit_with_their_code(glam, failing):
    failing(TrainError("loss not finite at step 12", hint="last good checkpoint: step 10"))
    assert glam("doctor") == (
        6,
        "",
        "error: loss not finite at step 12\nhint: last good checkpoint: step 10\n",
    )


def test_control_characters_never_reach_the_terminal(glam, failing):
    failing(GlamError("bad \x1b[31mname\u202e", hint="not \x07"))
    _, _, err = glam("doctor")
    assert err == "error: bad \\x1b[31mname\\u202e\nhint: not \\x07\n"


@pytest.mark.parametrize(
    ("no_color", "term", "coloured"), [("", "xterm", 2), ("1", "xterm", 0), ("", "dumb", 0)]
)
def test_a_terminal_gets_colour_unless_it_is_not_wanted(
    glam, monkeypatch, no_color, term, coloured
):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    # As on a terminal, where click takes colour away only if it is told to.
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda stream, color: color is False)
    _, _, err = glam("trian")
    assert (err.count("\x1b[31m") + err.count("\x1b[36m")) == coloured


def test_an_interrupt_ends_with_130(glam, failing):
    failing(KeyboardInterrupt())
    code, out, err = glam("doctor")
    assert (code, out) == (130, "")
    assert err.strip() == "error: interrupted"


def test_an_interrupt_does_not_wait_for_what_is_still_running_to_be_taken_down():
    code = """
import atexit, os, sys, types
import click
from glamcli.cli import main
def interrupted(): raise KeyboardInterrupt
atexit.register(os.abort)  # as XLA ends when it is computing
module = types.ModuleType("glamcli.cli.doctor")
module.command = click.command()(interrupted)
sys.modules[module.__name__] = module
sys.argv = ["glam", "doctor"]
main.run()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 130
    assert ended.stderr.strip() == "error: interrupted"


def test_a_bug_keeps_its_traceback_in_a_file(glam, failing, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(ZeroDivisionError("by nothing"))
    code, _, err = glam("doctor")
    assert code == 1
    assert "error: this is a bug in glam: ZeroDivisionError: by nothing" in err
    assert "Traceback" not in err
    [kept] = tmp_path.iterdir()
    assert str(kept) in err
    assert "Traceback" in kept.read_text()


@pytest.mark.parametrize("error", [ZeroDivisionError("by nothing"), GlamError("what")])
def test_debug_shows_the_traceback(glam, failing, error):
    failing(error)
    code, _, err = glam("--debug", "doctor")
    assert code == 1
    assert "Traceback" in err


def test_a_reader_that_leaves_is_no_error():
    run = subprocess.run(
        f"{sys.executable} -c 'from glamcli.cli.main import run; run()' recipe schema | head -n 1;"
        ' echo "${PIPESTATUS[0]}"',
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        shell=True,
        executable="/bin/bash",
    )
    assert run.stdout.splitlines()[0] == "{"
    assert run.stdout.splitlines()[1] in ("0", "141")  # the pipe may hold all of it
    assert run.stderr == ""


@pytest.mark.parametrize("command", ["list", "schema"])  # by rich and by itself
def test_a_full_disk_under_the_output_is_an_error_of_its_own(command):
    code = "from glamcli.cli.main import run; run()"
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", code, "recipe", command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    what = "error: standard output cannot be written: No space left on device\n"
    assert (run.returncode, run.stderr) == (1, what)


@pytest.mark.parametrize("flush", [True, False])
def test_a_full_disk_is_known_also_when_processes_have_joined(flush):
    run = python(
        "import click, contextlib, sys\nfrom pathlib import Path\n"
        "from glamcli.cli import main, several\nfrom glamcli.hosts import join\n"
        "@contextlib.contextmanager\ndef joined(*_):\n"
        " sys.stdout = open('/dev/full', 'w')\n yield join.ALONE\n"
        "join.joined = joined\n"
        "def show():\n"
        " with several.one_of_several((None,) * 3, Path('.'), several.Runtime(), True):\n"
        f"  print('a result', flush={flush})\n"
        "command = click.Command('x', callback=show)\n"
        "main.LazyGroup.get_command = lambda self, ctx, name: command\n"
        "main.run(['doctor'])"
    )
    what = "error: standard output cannot be written: No space left on device\n"
    assert (run.returncode, run.stderr) == (1, what)


def test_a_warning_of_a_library_is_one_line_without_its_code():
    run = python(
        "import warnings, click\nfrom glamcli.cli import main\n"
        "warn = click.Command('x', callback=lambda: warnings.warn('odd\\x1b[2J'))\n"
        "main.LazyGroup.get_command = lambda self, ctx, name: warn\n"
        "main.run(['doctor'])"
    )
    assert (run.returncode, run.stderr) == (0, "warning: odd\\x1b[2J\n")


def test_a_closed_output_is_no_output():
    run = subprocess.run(
        f"{sys.executable} -c 'from glamcli.cli.main import run; run()' recipe list >&- 2>&-",
        timeout=60,
        check=False,
        shell=True,
    )
    assert run.returncode == 0


@pytest.mark.parametrize("command", ["list", "schema"])  # by rich and by itself
def test_a_reader_that_left_before_the_first_line_ends_it_with_141(command):
    reading, writing = os.pipe()
    os.close(reading)
    code = "from glamcli.cli.main import run; run()"
    run = subprocess.run(
        [sys.executable, "-c", code, "recipe", command],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, b"")


def test_output_that_the_terminal_cannot_show_is_no_error():
    run = python(
        "import io, sys\n"
        "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='ascii')\n"
        "from glamcli.cli.main import run\nrun(['recipe', 'show', 'test-tiny', '--set', 'about=é'])"
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("about: ")
