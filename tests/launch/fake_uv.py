"""A `uv` that needs no network: an environment is a folder, a wheel is unpacked into it, and its
libraries are those of the Python that runs the tests."""

import os
import stat
import sys
from pathlib import Path
from zipfile import ZipFile


def main(arguments):
    if arguments[0] == "venv":
        (Path(arguments[-1]) / "bin").mkdir(parents=True)
        return
    options = dict(zip(arguments[2::2], arguments[3::2], strict=False))
    environment = Path(options["--python"]).parent.parent
    assert "jax==" in Path(options["--constraint"]).read_text()
    wheel, _, extras = arguments[-1].partition("[")
    assert "remote" in extras.rstrip("]").split(",")
    with ZipFile(wheel) as archive:
        archive.extractall(environment / "site")
    program = environment / "bin" / "glam"
    run = "from glamcli.cli.main import run; run()"
    command = os.environ.get("FAKE_GLAM") or f'{sys.executable} -c "{run}"'
    program.write_text(f'#!/bin/sh\nPYTHONPATH={environment}/site exec {command} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


main(sys.argv[1:])
