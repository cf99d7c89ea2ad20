"""Texts for people: what they call things."""

import json

import pytest

from glamcli import errors
from glamcli.cli import render
from glamcli.errors import GlamError, name_folder, printable

FOLDER = '/cache/ä "b"/0123'


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.setattr(errors, "_NAMES", {})
    name_folder(FOLDER, "gs://bucket/run")


def test_a_copy_of_a_run_is_called_by_its_url_in_everything_that_is_shown(capsys):
    error = GlamError(f"checkpoint {FOLDER}/checkpoints/3 is damaged", f"look at {FOLDER}")
    assert str(error) == "checkpoint gs://bucket/run/checkpoints/3 is damaged"
    assert error.hint == "look at gs://bucket/run"
    assert printable(f"kept in {FOLDER}/eval") == "kept in gs://bucket/run/eval"
    render.emit("step", folder=f"{FOLDER}/checkpoints/3")
    render.make_progress(as_json=True).say(f"A {FOLDER}")
    out, _ = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"event": "step", "folder": "gs://bucket/run/checkpoints/3"},
        {"event": "say", "text": "A gs://bucket/run"},
    ]
