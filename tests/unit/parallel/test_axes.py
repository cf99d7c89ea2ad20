import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from glamcli.config import schema
from glamcli.config.devices import Rules
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import GLAM, Layout, num_devices
from glamcli.parallel.mesh import make_mesh

MODEL = schema.Model(num_layers=2, model_dim=16, ffn_dim=32, num_heads=4, head_dim=8, vocab_size=64)
MOE = schema.Moe(num_experts=6)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("embed", "mlp"), (("data", "expert"), "model")),
        (("mlp", "embed"), ("model", ("data", "expert"))),
        (("vocab", "embed"), ("model", ("data", "expert"))),
        (("expert", "expert_embed", "expert_mlp"), ("expert", "data", "model")),
        (("layers", "embed", "heads", "head_dim"), ("stage", ("data", "expert"), "model", None)),
        (("batch", "seq", "act_embed"), (("slice", "data", "expert"), None, "model")),
    ],
)
def test_weights_and_activations_are_split_twice(axes, expected):
    assert GLAM.spec(axes) == PartitionSpec(*expected)


def test_no_array_uses_a_mesh_axis_twice():
    leaves = jax.tree.leaves(Decoder(MODEL, MOE).axes, is_leaf=lambda x: isinstance(x, tuple))
    for axes in leaves:
        used = [axis for name in axes if name is not None for axis in GLAM.split(name)]
        assert len(used) == len(set(used)), axes


def changed() -> Layout:
    return Layout.of(schema.Mesh(rules=Rules(embed=("data",), act_embed=())))


def test_a_recipe_may_change_single_rules():
    layout = changed()
    assert layout.spec(("embed", "mlp")) == PartitionSpec("data", "model")
    assert layout.spec(("batch", "seq", "act_embed")) == PartitionSpec(
        ("slice", "data", "expert"), None, None
    )
    assert hash(layout) == hash(changed()) != hash(GLAM)


def test_shardings_follow_the_tree_of_axes():
    decoder = Decoder(MODEL, MOE)
    mesh = make_mesh(schema.Mesh(data=2, expert=2, model=2))
    tree = GLAM.shardings(mesh, decoder.axes)
    assert jax.tree.structure(tree) == jax.tree.structure(decoder.shapes)
    table = tree["embedding"]["table"]
    assert table.shard_shape((64, 16)) == (32, 4)


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((4, 4))
    assert GLAM.constrain(x, "batch", "act_embed") is x
    assert num_devices() == 1
    with jax.set_mesh(make_mesh(schema.Mesh(), jax.devices()[:1])):
        assert GLAM.constrain(x, "batch", "act_embed") is x


def test_constrain_splits_what_divides_and_leaves_the_rest_whole():
    with jax.set_mesh(make_mesh(schema.Mesh(data=2, expert=2, model=2))):
        assert num_devices() == 8
        place = jax.jit(lambda x: GLAM.constrain(x, "batch", None, "act_embed"))
        assert place(jnp.ones((8, 3, 4))).sharding.shard_shape((8, 3, 4)) == (2, 3, 2)
        assert place(jnp.ones((3, 3, 4))).sharding.shard_shape((3, 3, 4)) == (3, 3, 2)


def test_constrain_wants_a_name_for_every_dimension():
    with pytest.raises(ValueError, match="2 axes for an array of 3"):
        GLAM.constrain(jnp.ones((1, 1, 1)), "batch", None)
