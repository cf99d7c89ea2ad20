"""Settings of generation are checked before anything is loaded."""

import subprocess
import sys

import pytest

from glamcli.decoding import Decoding
from glamcli.errors import RecipeError


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tokens": 0}, "`tokens` must be 1 to 65536, got 0"),
        ({"samples": 257}, "`samples` must be 1 to 256, got 257"),
        ({"beam": 100_000}, "`beam` must be 1 to 256, got 100000"),
        ({"beam": 2, "samples": 3}, "a beam of width 2 cannot give 3 samples"),
        ({"temperature": float("nan")}, "`temperature` must be 0 or more"),
        ({"top_p": 0.0}, "`top_p` must be above 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(options, what):
    with pytest.raises(RecipeError, match=what):
        Decoding(**options)


def test_they_need_no_jax():
    code = "import sys, glamcli.decoding\nassert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
