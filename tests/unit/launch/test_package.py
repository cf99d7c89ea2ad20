"""What the workers are sent is what runs here."""

import base64
import hashlib
import json
import subprocess
import sys
from zipfile import ZipFile

from glamcli.config.load import load_recipe
from glamcli.config.mixtures import load_mixture
from glamcli.launch.package import constraints, local_paths, write_package


def test_the_wheel_is_whole_and_its_program_finds_its_recipes(tmp_path):
    loaded = load_recipe("test-tiny")
    digest = write_package(tmp_path / "package", loaded, "/run", None)
    (wheel,) = (tmp_path / "package").glob("*.whl")
    with ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        for line in archive.read(record).decode().splitlines():
            name, digest_of_file, size = line.rsplit(",", 2)
            data = archive.read(name)
            if name != record:
                found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
                assert (digest_of_file, size) == (f"sha256={found.rstrip('=')}", str(len(data)))
        assert len(archive.read(record).splitlines()) == len(archive.namelist())
        archive.extractall(tmp_path / "site")
    code = "from glamcli.cli.main import run; run(['recipe', 'check', 'quickstart'])"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("quickstart: ok\n", "")
    assert write_package(tmp_path / "package", loaded, "/run", None) == digest
    assert write_package(tmp_path / "package", loaded, "/other", None) != digest


def test_the_recipe_that_is_sent_is_the_resolved_one(recipe, tmp_path):
    loaded = load_recipe(recipe, ["train.steps=7", "run.loggers=[tensorboard,wandb]"])
    write_package(tmp_path, loaded, "/run", "mount")
    sent = load_recipe(tmp_path / "recipe.yaml").recipe
    mixture = sent.data.mixture
    assert sent.model_copy(update={"data": loaded.recipe.data}) == loaded.recipe
    assert load_mixture(mixture) == load_mixture(loaded.recipe.data.mixture)
    assert local_paths(loaded) == [str(recipe.parent / f"{n}.txt") for n in ("numbers", "words")]
    package = json.loads((tmp_path / "package.json").read_text())
    assert (package["setup"], package["extras"]) == ("mount", "tpu,remote,wandb")


def test_libraries_are_pinned_but_for_what_jax_chooses_and_no_index_has():
    lines = constraints().splitlines()
    assert any(line.startswith("jax==") for line in lines)
    assert not any(line.startswith(("libtpu", "glamcli")) or "+" in line for line in lines)
