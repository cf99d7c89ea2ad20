"""The examples of docs/recipes.md are real: its files are written, its commands run."""

import doctest
import io
import re
import shlex
from pathlib import Path

import pytest

from glamcli.config.load import shipped

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)


def blocks(kind):
    """(name, text) of the fenced blocks of a kind, in order."""
    found = BLOCK.findall((ROOT / "docs" / "recipes.md").read_text())
    return [(name, text) for language, name, text in found if language == kind]


def pattern(expected):
    """A regular expression of an output in which a line `...` stands for any lines."""
    lines = ["(?:.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in expected]
    return "".join(lines)


@pytest.mark.parametrize("text", [text for _, text in blocks("console")])
def test_a_command_of_the_docs_prints_what_they_say(glam, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for name, content in blocks("yaml"):
        (tmp_path / name).write_text(content)
    command, *expected = text.splitlines()
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "glam"
    _, out, err = glam(*arguments)
    # Where recipes are installed is another place on every machine.
    said = (err + out).replace(f"{next(iter(shipped('recipes').values())).parent}/", "")
    assert re.fullmatch(pattern(expected), said), said


def test_the_mixture_of_the_docs_is_fine(glam, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in blocks("yaml"):
        (tmp_path / name).write_text(content)
    assert glam("recipe", "check", "./mine.yaml", "--set", "data.mixture=./texts.yaml")[0] == 0


@pytest.mark.slow  # trains, compiles and evaluates
def test_what_the_docs_show_of_python_is_what_it_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = (ROOT / "docs" / "python.md").read_text()
    examples = "".join(code for language, _, code in BLOCK.findall(text) if language == "python")
    test = doctest.DocTestParser().get_doctest(examples, {}, "docs/python.md", None, 0)
    assert len(test.examples) > 15
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = io.StringIO()
    runner.run(test, out=said.write)
    assert runner.failures == 0, said.getvalue()
