import jax
import pytest

from glamcli.config import schema
from glamcli.config.load import load_recipe
from glamcli.errors import PlanError, RecipeError
from glamcli.parallel.mesh import make_mesh, mesh_shape
from glamcli.train.programs import make_decoder


def test_auto_takes_the_devices_that_the_other_axes_leave():
    assert mesh_shape(schema.Mesh(), 8)["data"] == 8
    assert mesh_shape(schema.Mesh(expert=2, model=2), 8)["data"] == 2
    mesh = make_mesh(schema.Mesh(model=4))
    assert dict(mesh.shape) == {"slice": 1, "stage": 1, "data": 2, "expert": 1, "model": 4}
    assert mesh.size == len(jax.devices())


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 6, 8])
def test_a_refused_mesh_comes_with_one_that_fits(num_devices):
    asked = schema.Mesh(data=2, expert=5, model=4)
    with pytest.raises(PlanError, match=f"asks for 2 x 5 x 4 .* found {num_devices}") as caught:
        mesh_shape(asked, num_devices)
    numbers = [int(word) for word in caught.value.hint.replace(",", "").split() if word.isdigit()]
    devices, stages_to_model, data = numbers[0], numbers[1:-1], numbers[-1]
    product = data
    for size in stages_to_model:
        product *= size
    assert devices == num_devices == product


def test_auto_refuses_axes_that_do_not_divide_the_devices():
    with pytest.raises(PlanError, match="found 8"):
        mesh_shape(schema.Mesh(model=3), 8)


def test_an_error_of_the_devices_is_placed_in_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: test-tiny\nbatch:\n  rows: 6\nmesh:\n  data: auto\n")
    loaded = load_recipe(path)
    with pytest.raises(RecipeError, match=r"mine\.yaml:3: `batch\.rows` is 6"), loaded.placing():
        make_decoder(loaded.recipe, mesh_shape(loaded.recipe.mesh, 4))
    asked = load_recipe(path, ["mesh.data=2"])
    with pytest.raises(PlanError, match=r"^--set: the mesh asks for 2 devices"), asked.placing():
        mesh_shape(asked.recipe.mesh, 4)
