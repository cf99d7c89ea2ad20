"""What XLA is told beside a program's text."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glamcli.config.load import load_recipe
from glamcli.train.programs import compiler_options


@pytest.mark.parametrize(
    ("platform", "value", "told"),
    [("tpu", "off", True), ("tpu", "auto", False), ("cpu", "off", False), ("gpu", "off", False)],
)
def test_products_stay_whole_on_tpus_unless_the_recipe_leaves_them_to_xla(platform, value, told):
    recipe = load_recipe("test-tiny", [f"mesh.collective_matmul={value}"]).recipe
    mesh: Any = SimpleNamespace(devices=np.array([[SimpleNamespace(platform=platform)]]))
    assert bool(compiler_options(recipe, mesh)) == told
