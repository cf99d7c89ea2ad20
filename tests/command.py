"""The command line in this process."""

import pytest

from glamcli.cli import main


@pytest.fixture
def glam(capsys):
    """Runs a command: (exit code, stdout, stderr)."""

    def glam(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main.run([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return glam
