"""`glam checkpoint` as a person and as a program meet it."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from glamcli import step_folders, stored_arrays
from glamcli.checkpoint import Checkpoints
from glamcli.hosts.lock import locked

RECIPE = {"batch": {"rows": 2, "row_tokens": 8}, "train": {"steps": 50}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run with steps 10, 20, 30; relative, as it is mostly named."""
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path / "runs/r/checkpoints")
    for step in (10, 20, 30):
        state = {"step": jnp.array(step), "w": jnp.full((4, 4), float(step))}
        checkpoints.save(step, state, {"recipe": RECIPE})
    checkpoints.close()
    run = tmp_path / "runs/r"
    (run / "run.json").write_text(json.dumps({"recipe": RECIPE}))
    lines = [{"step": step, "heldout/a": 1.5} for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def damage(folder, step):
    """Every file that holds array data is emptied."""
    for path in (folder / f"checkpoints/{step}/state").rglob("d/*"):
        path.write_bytes(b"")


def test_list_shows_every_step_and_every_rewind(glam, folder):
    glam("checkpoint", "rewind", "runs/r", "--to", 20, "--skip-batches", 4, "--reason", "a \x1b[2J")
    code, out, err = glam("checkpoint", "list", "runs/r")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["10", "good"], ["20", "good"], ["30", "set"]]
    assert rows[0] == ["step", "status", "size", "saved", "tokens", "loss"]
    assert [row[-2:] for row in rows[1:4]] == [["160", "1.500"], ["320", "1.500"], ["480", "-"]]
    assert "from step 30 to 20, 4 batches skipped (a \\x1b[2J)" in out
    code, out, err = glam("checkpoint", "list", "runs/r", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["checkpoint"] * 3 + ["rewind"]
    assert (events[1]["step"], events[1]["heldout_nats"]) == (20, {"a": 1.5})


def test_list_imports_neither_jax_nor_orbax(folder):
    code = (
        "import sys\nfrom glamcli.cli.main import run\n"
        "try: run(['checkpoint', 'list', 'runs/r'])\nfinally:\n"
        " assert not {'jax', 'orbax', 'tensorstore'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
    assert "good" in ended.stdout


@pytest.mark.parametrize(
    ("module", "name"),
    [(step_folders, "examined"), (stored_arrays, "complete_meta"), (stored_arrays, "read_arrays")],
)
def test_a_step_that_training_deletes_meanwhile_is_left_out(
    glam, folder, monkeypatch, module, name
):
    real = getattr(module, name)

    def deleting(path, *others):
        if path.name == "10":
            shutil.rmtree(path, ignore_errors=True)
        return real(path, *others)

    monkeypatch.setattr(module, name, deleting)
    code, out, err = glam("checkpoint", "verify", "runs/r")
    assert (code, out) == (0, "step 20: verified\nstep 30: verified\n"), err


def test_steps_that_are_all_set_aside_are_not_verified_in_silence(glam, folder):
    (folder / "checkpoints/set-aside").mkdir()
    for step in ("10", "20", "30"):
        step_folders.move_aside(folder / "checkpoints", step)
    code, out, err = glam("checkpoint", "verify", "runs/r")
    assert (code, out) == (4, "")
    assert "no complete checkpoint (all are set aside: 10, 20, 30)" in err


READING = [
    ("verify", "runs/r"),
    ("rewind", "runs/r", "--to", "20"),
    ("diff", "runs/r/checkpoints/10", "runs/r"),
]


@pytest.mark.parametrize("arguments", READING)
def test_running_out_of_memory_is_explained(glam, folder, monkeypatch, arguments):
    def read_arrays(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(stored_arrays, "read_arrays", read_arrays)
    code, out, err = glam("checkpoint", *arguments)
    assert (code, out) == (5, "")
    assert "Out of memory allocating 9 bytes" in err
    assert "hint: arrays are read whole" in err


@pytest.mark.slow
@pytest.mark.parametrize("arguments", READING)
def test_no_accelerator_is_used(folder, arguments):
    code = "from glamcli.cli.main import run; run()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "checkpoint", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "none-such"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_verify_names_what_is_damaged_and_exits_with_4(glam, folder):
    code, out, _ = glam("checkpoint", "verify", "runs/r")
    assert (code, out) == (0, "step 10: verified\nstep 20: verified\nstep 30: verified\n")
    damage(folder, 20)
    (folder / "checkpoints/30/meta/metadata").write_text("{")
    code, out, _ = glam("checkpoint", "verify", "runs/r")
    assert code == 4
    lines = out.splitlines()
    assert lines[0] == "step 10: verified"
    assert lines[1].startswith("step 20: damaged: ")
    assert "state/d/" in lines[1]
    assert lines[2].startswith("step 30: damaged: ")
    assert glam("checkpoint", "verify", "runs/r", "--step", 10)[0] == 0
    code, _, err = glam("checkpoint", "verify", "runs/r", "--step", 15)
    assert code == 4
    assert "no complete checkpoint of step 15" in err


def test_steps_of_older_formats_are_read_and_said_to_have_no_digests(glam, folder):
    description = folder / "checkpoints/10/meta/metadata"
    meta = json.loads(description.read_text())
    older = {name: meta[name] for name in meta if name not in ("digests", "checksum")}
    description.write_text(json.dumps(older | {"format": 3}))
    code, out, _ = glam("checkpoint", "verify", "runs/r", "--step", 10)
    assert (code, out) == (0, "step 10: without digests\n")
    damage(folder, 10)
    assert glam("checkpoint", "verify", "runs/r", "--step", 10)[0] == 4


def test_a_step_of_a_bad_streak_can_be_gone_back_to_with_a_warning(glam, folder):
    checkpoints = Checkpoints(folder / "checkpoints", keep=9)
    checkpoints.save(40, {"w": jnp.zeros(2)}, {"recipe": RECIPE, "good": False})
    checkpoints.close()
    code, _, err = glam("checkpoint", "rewind", "runs/r", "--to", 40)
    assert code == 0
    assert "warning: step 40 was saved in a bad streak" in err


def test_rewind_moves_later_steps_aside_and_says_how_to_go_on(glam, folder):
    code, out, _ = glam("checkpoint", "rewind", "runs/r", "--to", 10, "--skip-batches", 4)
    assert code == 0
    assert out == (
        "step 30 is now runs/r/checkpoints/set-aside/30\n"
        "step 20 is now runs/r/checkpoints/set-aside/20\n"
        "\nnext:\n  glam train runs/r\n"
    )
    assert Checkpoints(folder / "checkpoints").steps() == [10]
    assert (folder / "metrics.after-10.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("runs/r", "--to", 15), 4, "has [30, 20, 10]"),
        (("runs/r", "--to", 20), 4, "20 cannot be used: state/d/"),
        (("runs/r", "--to", 20), 4, "hint: `glam checkpoint verify runs/r` finds"),
        (("runs/r", "--to", 10, "--skip-batches", 40), 4, "leaves nothing of 50 steps"),
        (("runs/none", "--to", 10), 4, "no complete checkpoint"),
        (("runs/r/checkpoints", "--to", 10), 4, "no complete checkpoint"),
        (("runs/r",), 2, "--to"),
        (("https://r", "--to", 10), 2, "cannot be a URL"),
    ],
)
def test_a_rewind_that_cannot_be_changes_nothing(glam, folder, arguments, code, message):
    damage(folder, 20)
    before = sorted(str(path) for path in folder.rglob("*") if path.name != ".lock")
    found, out, err = glam("checkpoint", "rewind", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert sorted(str(path) for path in folder.rglob("*") if path.name != ".lock") == before


def test_a_run_in_use_is_not_rewound(glam, folder):
    with locked(folder):
        code, _, err = glam("checkpoint", "rewind", "runs/r", "--to", 10)
    assert code == 4
    assert "is in use by process" in err
    assert "hint: stop it first" in err
    assert Checkpoints(folder / "checkpoints").steps() == [30, 20, 10]


def test_diff_shows_what_differs_between_two_steps(glam, folder):
    code, out, _ = glam("checkpoint", "diff", "runs/r/checkpoints/10", "runs/r")
    assert code == 0
    assert out.startswith(f"A {folder}/checkpoints/10\nB {folder}/checkpoints/30\n")
    rows = [line.split() for line in out.splitlines()]
    assert ["step", "step", "10", "30"] in rows
    assert ["w", "[4,", "4]", "100.0%", "20", "2"] in rows
    assert out.endswith("\n0 arrays are equal, 2 differ\n")
    code, out, _ = glam("checkpoint", "diff", "runs/r", "runs/r", "--json")
    event = json.loads(out.splitlines()[-1])
    assert (event["num_equal"], event["arrays"], event["others"]) == (2, [], [])


def test_a_record_of_an_impossible_time_is_shown_without_it(glam, folder):
    glam("checkpoint", "rewind", "runs/r", "--to", 20)
    record = json.loads((folder / "rewinds.jsonl").read_text())
    (folder / "rewinds.jsonl").write_text(json.dumps({**record, "unix_seconds": 1e300}))
    assert "rewound -: from step 30 to 20" in glam("checkpoint", "list", "runs/r")[1]
