"""`mesh: auto`: by what fits, smallest `model`, then largest `expert`, then `data`."""

import re

import pytest

from glamcli import trained
from glamcli.config.load import load_recipe
from glamcli.errors import PlanError, RecipeError
from glamcli.hosts.join import ALONE
from glamcli.progress import Silent
from glamcli.train import automesh, loop

GIB = 2**30
BIG = 2**50


def chosen(name, num_devices, device_bytes, *sets):
    choice = automesh.choose(
        load_recipe(name, ["mesh=auto", *sets]).recipe, num_devices, device_bytes
    )
    mesh = choice.mesh
    assert not mesh.auto
    return (mesh.data, mesh.expert, mesh.model), choice


@pytest.mark.parametrize(
    ("name", "num_devices", "device_gib", "expected"),
    [
        ("test-tiny", 1, 1, (1, 1, 1)),
        ("test-tiny", 8, 1, (2, 4, 1)),  # 4 experts
        ("quickstart", 8, 1, (1, 8, 1)),
        ("glam_64b_64e", 1024, 32, (16, 64, 1)),
        ("glam_64b_64e", 1024, 16, (1, 64, 16)),  # where gathering a layer takes too much
        ("glam_64b_64e", 2048, 32, (16, 64, 2)),  # 1,024 rows
        ("glam_137b", 256, 32, (256, 1, 1)),  # dense: no expert axis
    ],
)
def test_the_rule_decides(name, num_devices, device_gib, expected):
    found, choice = chosen(name, num_devices, device_gib * GIB)
    assert found == expected
    assert choice.num_bytes <= automesh.ROOM * choice.device_bytes


def test_model_is_split_only_to_fit():
    roomy = chosen("glam_0.1b_64e", 8, BIG)[1]
    assert roomy.mesh.model == 1
    # So little that not even all devices leave the room that activations are due.
    tight = chosen("glam_0.1b_64e", 8, roomy.num_bytes)[1]
    assert roomy.num_bytes >= tight.num_bytes > automesh.ROOM * tight.device_bytes
    with pytest.raises(PlanError, match=r"too large for 8 devices: mesh: .* take"):
        chosen("glam_0.1b_64e", 8, tight.num_bytes // 2)


def test_what_is_said_of_slices_stays_and_what_does_not_divide_is_told():
    found, choice = chosen("quickstart", 8, BIG, "mesh.slice=2")
    assert (found, choice.mesh.slice) == ((1, 4, 1), 2)
    assert str(choice).startswith("mesh: slice 2 x expert 4; weights, gradients and optimizer")
    with pytest.raises(PlanError, match="no layout over 7 devices"):
        chosen("quickstart", 7, BIG)
    with pytest.raises(RecipeError, match=r"`mesh: auto` chooses `mesh\.model`, but it is 4"):
        load_recipe("quickstart", ["mesh=auto", "mesh.model=4"])


def test_bytes_are_those_of_the_state():
    _, choice = chosen("test-tiny", 1, BIG)
    recipe = load_recipe("test-tiny").recipe
    decoder = automesh.Decoder(recipe.model, recipe.moe)
    state = automesh.abstract_state(decoder, recipe.optimizer)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in automesh.jax.tree.leaves(state)]
    weights = [leaf.size * 4 for leaf in automesh.jax.tree.leaves(state.params)]
    assert choice.num_bytes == sum(sizes) + sum(weights)


class Device:
    """As jax shows one."""

    def __init__(self, platform, **stats):
        self.platform, self.memory_stats = platform, lambda: stats


def test_a_given_mesh_is_refused_before_anything_is_computed_where_devices_tell_their_memory(
    tmp_path, monkeypatch
):
    def whole(*sets):  # on every device but where experts or matrices are split
        rules = ("mesh.rules.embed=[]", "mesh.rules.expert_embed=[]")
        return load_recipe("test-tiny", [*rules, *sets]).recipe

    def laid_out(platform, limit, *sets):
        device = Device(platform, bytes_limit=limit)
        monkeypatch.setattr(automesh.jax, "local_devices", lambda: [device])
        return automesh.layout(whole(*sets), ALONE, Silent())

    held, _ = automesh._needs(whole(), 8)(laid_out("cpu", 1, "mesh.data=8"))
    laid_out("gpu", held)
    with pytest.raises(PlanError, match="too large: mesh: data 8; weights, gradients") as refused:
        laid_out("gpu", held - 1)
    assert refused.value.exit_code == 5
    hint = refused.value.hint.removeprefix("by this arithmetic another mesh fits: ")
    mesh = laid_out("gpu", held - 1, *hint.replace("--set ", "").split())
    assert (mesh.data, mesh.expert, mesh.model) == (1, 4, 2)
    with pytest.raises(PlanError) as refused:
        laid_out("tpu", 1000)
    assert re.fullmatch(r"about [\d,]+ devices would hold it", refused.value.hint)

    cache = f"data.cache_dir={tmp_path}/cache"
    monkeypatch.setattr(loop, "Beginning", None)  # the next thing, which initialises
    with pytest.raises(PlanError, match="too large: mesh: data 8; weights, gradients and"):
        loop.train(load_recipe("test-tiny", [cache]).recipe, tmp_path / "run", Silent())


def test_stages_ask_for_copies_of_their_weights_too():
    sets = ("mesh.stage=8", "mesh.data=auto", "pipeline.microbatches=32")
    recipe = load_recipe("glam_137b", sets).recipe
    choice = automesh.choose(recipe, 1024, 31 * 2**30)
    of_a_stage = 137e9 / 8 / choice.mesh.model
    assert choice.mesh.model >= 8
    assert choice.num_bytes > 10 * of_a_stage


def test_weights_are_opened_on_one_device_unless_they_are_too_large_for_it(monkeypatch, tmp_path):
    recipe = load_recipe("test-tiny", ["mesh.stage=2", "model.num_layers=4"], check=False).recipe
    meta = {"recipe": recipe.model_dump(mode="json")}
    for room, num_devices in ((BIG, 1), (200_000, 8)):
        monkeypatch.setattr(automesh, "device_bytes", lambda room=room: room)
        params = trained._by_size(meta, tmp_path)
        leaves = automesh.jax.tree.leaves(params)
        assert {len(leaf.sharding.device_set) for leaf in leaves} == {num_devices}
    w_in = params["blocks"]["expert_layer"]["ffn"]["w_in"]
    assert w_in.shape == (2, 4, 32, 64)
    assert w_in.sharding.shard_shape(w_in.shape) == (2, 1, 32, 32)
