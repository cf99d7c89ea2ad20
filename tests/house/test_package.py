"""What a wheel must carry: recipes, mixtures, suites, the typed marker, one version."""

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

import glamcli

GLAM = (sys.executable, "-c", "from glamcli.cli.main import run; run()")
ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_is_the_same_everywhere():
    assert PROJECT["project"]["version"] == glamcli.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(glamcli.__version__)}\b", changelog, re.M)


def test_every_extra_that_texts_name_can_be_installed():
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("glamcli/**/*.py")]
    text = "".join(path.read_text() for path in paths)
    named = set(re.findall(r"(?:`|'glamcli|'\.)\[(\w+)\]['`]", text))
    assert {"remote", "tpu"} < named <= PROJECT["project"]["optional-dependencies"].keys()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> ZipFile:
    builders = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = builders.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return ZipFile(built)


def test_a_wheel_holds_everything_the_program_reads(wheel):
    names = set(wheel.namelist())
    for source, place in (
        ("glamcli", "glamcli"),
        ("recipes", "glamcli/recipes"),
        ("data_mixtures", "glamcli/data_mixtures"),
    ):
        tracked = [path for path in (ROOT / source).rglob("*") if path.is_file()]
        wanted = {f"{place}/{path.relative_to(ROOT / source)}" for path in tracked}
        wanted = {name for name in wanted if "__pycache__" not in name}
        assert len(wanted) > 2
        assert wanted <= names, wanted - names
    assert {"glamcli/py.typed", "glamcli/recipes/quickstart.yaml"} <= names
    assert [name for name in names if name.startswith("glamcli/evals/suites/tasks/")]
    outside = {name.split("/")[0] for name in names}
    assert outside == {"glamcli", f"glamcli-{glamcli.__version__}.dist-info"}, "and nothing else"


def test_a_wheel_names_its_licence_and_its_command(wheel):
    info = f"glamcli-{glamcli.__version__}.dist-info"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    entry = configparser.ConfigParser()
    entry.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entry["console_scripts"]) == {"glam": "glamcli.cli.main:run"}


def test_the_program_in_a_wheel_finds_its_recipes(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    found = subprocess.run(
        [*GLAM, "recipe", "check", "quickstart", "glam_64b_64e"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (found.stdout, found.stderr) == ("quickstart: ok\nglam_64b_64e: ok\n", "")
