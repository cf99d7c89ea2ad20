"""`glam doctor` and `glam doctor parity`: what they print, and how they end."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest

from glamcli.doctor import parity
from glamcli.doctor.parity import Difference


@pytest.fixture
def doctor(glam):
    return partial(glam, "doctor")


@pytest.fixture
def measured(monkeypatch):
    """Makes every comparison find this gradient error."""

    def measured(error):
        def difference(self, case, dispatch):
            sizes = {"data": case.mesh.data, "model": case.mesh.model}
            worst = "blocks.dense_layer.ffn.gate"
            return Difference(case.name, sizes, dispatch, 0.0, 1e-7, error, worst, 1e-8, worst, 0.1)

        monkeypatch.setattr(parity.Parity, "difference", difference)

    return measured


def test_the_machine_is_described(doctor):
    code, out, _ = doctor("--json")
    assert code == 0
    assert json.loads(out)["devices"] == "8 x cpu"


def test_every_mesh_is_listed_with_what_differs_most(doctor, measured):
    measured(3e-7)
    code, out, err = doctor("parity", "test-tiny", "--only", "2D")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("GLaM 2D")]
    assert [line.split()[-6:] for line in lines] == [
        [dispatch, "0", "1e-07", "3e-07", "1e-08", "equal"] for dispatch in parity.DISPATCHES
    ]


def test_a_mesh_that_differs_ends_with_6(doctor, measured):
    measured(2e-5)
    code, out, err = doctor("parity", "test-tiny", "--only", "2D")
    assert code == 6
    assert "blocks.dense_layer.ffn.gate DIFFERS" in out
    assert "3 of 3 meshes differ from one device by more than 1e-05; `GLaM 2D` by 2.0e-05" in err


def test_numbers_that_are_none_differ(doctor, measured):
    measured(float("nan"))
    assert doctor("parity", "test-tiny", "--only", "2D")[0] == 6


def test_json_has_a_line_per_mesh(doctor, measured):
    measured(3e-7)
    _, out, _ = doctor("parity", "glam_0.1b", "--json")
    rows = [row for line in out.splitlines() if (row := json.loads(line))["event"] == "mesh"]
    assert [row["name"] for row in rows] == [case.name for case in parity.CASES]
    assert rows[0]["equal"] is True
    assert rows[0]["gradient"] == 3e-7


def test_a_mesh_that_is_not_there_is_named(doctor):
    code, _, err = doctor("parity", "test-tiny", "--only", "xyz")
    assert code == 2
    assert err.splitlines()[0] == "error: no mesh has `xyz` in its name"
    assert "`GLaM 2D`" in err


@pytest.mark.slow
def test_eight_devices_are_simulated_on_any_machine():
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA"))
    }
    code = "from glamcli.cli.main import run; run()"
    words = ["doctor", "parity", "glam_0.1b", "--only", "sharded data x", "--json"]
    run = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=clean,
    )
    assert run.returncode == 0, run.stderr
    rows = [row for line in run.stdout.splitlines() if (row := json.loads(line))["event"] == "mesh"]
    assert [(row["name"], row["equal"]) for row in rows] == [("sharded data x sequence", True)]
