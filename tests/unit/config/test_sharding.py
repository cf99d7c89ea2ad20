import jax
import jax.numpy as jnp
import pytest

from glamcli.config.load import load_recipe
from glamcli.config.sharding import (
    ACTIVATIONS,
    axis_sizes,
    check_divides,
    indivisible,
    indivisible_rows,
    table,
    weights,
)
from glamcli.errors import RecipeError
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import Layout

RECIPES = {"experts": "test-tiny", "dense": "glam_0.1b"}


def flat(tree, leaf):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, leaf))
    return {".".join(entry.key for entry in path): value for path, value in leaves}


@pytest.mark.parametrize("name", RECIPES.values(), ids=RECIPES)
def test_the_list_of_weights_is_the_model_s_own(name):
    recipe = load_recipe(name).recipe
    decoder = Decoder(recipe.model, recipe.moe)
    assert weights(recipe) == flat(decoder.axes, tuple)
    known = axis_sizes(recipe)
    for path, leaf in flat(decoder.shapes, jax.ShapeDtypeStruct).items():
        for axis, size in zip(weights(recipe)[path], leaf.shape, strict=True):
            assert axis is None or known[axis][0] == size, path


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "dropless"])
def test_the_list_of_activations_holds_all_that_the_model_lays_out(dispatch, monkeypatch):
    seen = set()

    def record(self, x, *axes):
        seen.add(axes)
        return x

    def record_all(self, run, in_axes, out_axes, axis_sizes=None):
        seen.update(in_axes)
        return run

    monkeypatch.setattr(Layout, "constrain", record)
    monkeypatch.setattr(Layout, "on_each_device", record_all)
    recipe = load_recipe("test-tiny").recipe
    decoder = Decoder(recipe.model, recipe.moe)

    def loss(params, tokens_BS):
        x_BSM, _ = decoder.hidden(params, tokens_BS, tokens_BS, dispatch=dispatch)
        return decoder.losses(params, x_BSM, tokens_BS)[0].sum()

    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    jax.eval_shape(jax.grad(loss), decoder.shapes, tokens)
    # One name alone cannot contradict another.
    several = {axes for axes in seen if sum(name is not None for name in axes) > 1}
    assert several <= set(ACTIVATIONS.values())
    assert {"act_heads", "act_mlp", "act_vocab"} <= {name for axes in several for name in axes}


@pytest.mark.parametrize(
    ("residual", "seq", "act_embed"),
    [("embed", (), ("model",)), ("sequence", ("model",), ()), ("whole", (), ())],
)
def test_one_field_decides_how_the_residual_stream_is_split(residual, seq, act_embed):
    mesh = load_recipe("test-tiny", [f"mesh.residual={residual}"]).recipe.mesh
    assert (table(mesh).seq, table(mesh).act_embed) == (seq, act_embed)
    mesh = load_recipe("test-tiny", [f"mesh.residual={residual}", "mesh.rules.seq=[]"]).recipe.mesh
    assert (table(mesh).seq, table(mesh).act_embed) == ((), act_embed)


WRONG = {
    "weights": (
        ["mesh.rules.embed=[model]"],
        "`embedding.table` [vocab, embed] would be split over `mesh.model` twice, by "
        "`mesh.rules.vocab` and `mesh.rules.embed`",
        "take `model` out of one of them",
    ),
    "activations": (
        ["mesh.rules.act_embed=[data]"],
        "the residual stream [batch, seq, act_embed] would be split over `mesh.data` twice",
        "take `data` out",
    ),
    "residual": (
        ["mesh.residual=sequence", "mesh.rules.act_embed=[model]"],
        "by `mesh.rules.seq` and `mesh.rules.act_embed`",
        None,
    ),
    "experts": (
        ["mesh.rules.expert_embed=[expert]"],
        "`blocks.expert_layer.ffn.w_in` [layers, expert, expert_embed, expert_mlp] would be split",
        "take `expert` out",
    ),
    "one rule": (["mesh.rules.mlp=[model, model]"], "names `model` twice", "once is enough"),
    "slow network": (["mesh.rules.embed=[slice]"], "carries rows only", "take `slice` out"),
    "stages": (["mesh.rules.mlp=[stage]"], "holds layers", "take `stage` out"),
    "layers": (["mesh.rules.layers=[data]"], "may only use `stage`", "use [stage] or []"),
    "sequence": (
        ["mesh.residual=sequence", "mesh.model=2", "batch.row_tokens=63", "moe.group_tokens=63"],
        "`batch.row_tokens` is 63, which does not divide over `mesh.model` 2 (`seq` of",
        "`mesh.model` may be 1",
    ),
    "other axis": (
        ["mesh.rules.heads=[expert]", "mesh.rules.embed=[]", "mesh.expert=4"],
        "`model.num_heads` is 2, which does not divide over `mesh.expert` 4",
        "`mesh.expert` may be 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_table_that_no_mesh_can_follow_is_refused_where_it_was_written(case):
    sets, what, hint = WRONG[case]
    with pytest.raises(RecipeError) as caught:
        load_recipe("test-tiny", sets)
    text = f"{caught.value.what}\n{caught.value.hint}"
    assert what in text
    assert hint is None or hint in text
    assert case in ("sequence", "other axis") or "--set: " in text


def test_rows_are_counted_over_the_axes_that_split_them():
    rows = ["mesh.rules.batch=[data]", "batch.rows=4"]
    load_recipe("test-tiny", ["mesh.expert=4", "mesh.data=4", *rows])


SIZES = {"slice": 1, "stage": 1, "data": 1, "expert": 1, "model": 1}


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"expert": 8}, "`moe.num_experts` is 4, which does not divide over `mesh.expert` 8", "4"),
        ({"model": 4}, "`model.num_heads` is 2, which does not divide over `mesh.model` 4", "2"),
        ({"data": 12}, "`batch.rows` is 8, which does not divide over 12 data shards", "use 12"),
        ({"stage": 4}, "`model.num_layers` is 1 (in pairs), which does not divide over", "1"),
    ],
)
def test_what_does_not_split_evenly_over_a_mesh_is_named_with_what_does(change, message, hint):
    recipe = load_recipe("test-tiny").recipe
    check_divides(indivisible(recipe, SIZES))
    with pytest.raises(RecipeError) as caught:
        check_divides(indivisible(recipe, SIZES | change))
    assert caught.value.what.startswith(message)
    assert hint in (caught.value.hint or "")


def test_rows_divide_over_shards_and_accumulated_parts():
    recipe = load_recipe("test-tiny", ["batch.rows=24", "batch.accumulate=3"]).recipe
    shape = SIZES | {"data": 2, "expert": 2, "model": 2}
    assert not list(indivisible_rows(recipe, shape))
    fewer = recipe.batch.model_copy(update={"rows": 10})
    ((key, what, hint),) = indivisible_rows(recipe.model_copy(update={"batch": fewer}), shape)
    assert (key, hint) == ("batch.rows", "use 12")
    assert what == (
        "`batch.rows` is 10, which does not divide over 4 data shards (`mesh.slice` x `mesh.data` "
        "x `mesh.expert`) x 3 accumulated parts"
    )
