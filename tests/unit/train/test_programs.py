"""What XLA is told beside a program's text."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from glamcli.config.load import load_recipe
from glamcli.errors import RecipeError
from glamcli.parallel.mesh import make_mesh
from glamcli.train.programs import compiled, compiler_options, make_decoder, trace_train_step


@pytest.mark.parametrize(
    ("platform", "value", "told"),
    [("tpu", "off", True), ("tpu", "auto", False), ("cpu", "off", False), ("gpu", "off", False)],
)
def test_products_stay_whole_on_tpus_unless_the_recipe_leaves_them_to_xla(platform, value, told):
    recipe = load_recipe("test-tiny", [f"mesh.collective_matmul={value}"]).recipe
    mesh: Any = SimpleNamespace(devices=np.array([[SimpleNamespace(platform=platform)]]))
    assert bool(compiler_options(recipe, mesh)) == told


def test_every_part_of_a_step_has_its_name_in_a_trace():
    recipe = load_recipe("test-tiny", ["model.num_layers=2"]).recipe
    mesh = make_mesh(recipe.mesh, jax.devices()[:1])
    traced = trace_train_step(make_decoder(recipe, mesh.shape), recipe, 2, mesh)
    paths = re.findall(r'^#loc\d+ = loc\("([^"]+)"', traced.lower().as_text(debug_info=True), re.M)
    named = {part for path in paths for part in re.split(r"[/()]+", path)}
    assert named >= {"expert_layer", "dense_layer", "embed", "norm", "final_norm", "ffn"}
    assert named >= {"attention", "projections", "bias", "logits", "softmax", "values"}
    assert named >= {"router", "experts_gather", "dispatch", "experts", "combine"}
    assert named >= {"loss", "optimizer", "guard", "param_norm"}
    assert any("transpose(jvp(expert_layer))/experts_gather/dispatch" in path for path in paths)


def test_flags_of_the_recipe_reach_the_compiler_and_one_it_refuses_is_named():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    mesh: Any = SimpleNamespace(devices=np.array([[SimpleNamespace(platform="tpu")]]))
    sets = ["mesh.collective_matmul=auto", "runtime.xla_flags.xla_cpu_enable_fast_math=false"]
    options = compiler_options(load_recipe("test-tiny", sets).recipe, mesh)
    assert options == {"xla_cpu_enable_fast_math": False}
    assert compiled(lowered, options)(1.0) == 2
    for name, value in {"xla_no_such_flag": True, "xla_cpu_enable_fast_math": "maybe"}.items():
        with pytest.raises(RecipeError, match=name) as caught:
            compiled(lowered, {name: value})
        assert caught.value.key == "runtime.xla_flags"
