"""The compiled training step is what was meant: which collectives run over which mesh axes."""

import functools
import math

import jax
import pytest

from glamcli.config.load import load_recipe
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import Layout
from glamcli.parallel.mesh import make_mesh
from glamcli.plan.collectives import collectives
from glamcli.plan.hlo import Module, arrays
from glamcli.train import programs

# Sizes that tell whole dimensions from parts of them by their numbers.
B, S, M, H, V, E = 16, 64, 32, 96, 512, 8
SIZES = (
    f"model={{num_layers: 2, model_dim: {M}, ffn_dim: {H}, num_heads: 8, head_dim: 8,"
    f" vocab_size: {V}, activation_dtype: float32}}",
    f"batch={{rows: {B}, row_tokens: {S}}}",
    "mesh.data=1",
)
EXPERTS = (f"moe={{num_experts: {E}, group_tokens: {S}, dispatch: gather}}",)
ALL = (*EXPERTS, "mesh.slice=2", "mesh.expert=2", "mesh.model=2", "mesh.residual=sequence")
STAGES = ("moe=null", "mesh.stage=2", "mesh.data=4", "pipeline.microbatches=4")
TICKS = 4 + 2 - 1


@functools.cache
def compiled(*sets):
    """The step's HLO and its collectives."""
    recipe = load_recipe("test-tiny", [*SIZES, *sets]).recipe
    mesh = make_mesh(recipe.mesh)
    decoder = programs.make_decoder(recipe, mesh.shape)
    text = programs.trace_train_step(decoder, recipe, 2, mesh).lower().compile().as_text()
    assert text is not None
    return Module(text), collectives(text, mesh.shape)


def shapes(module):
    """Shapes of all arrays that the program ever makes."""
    lines = (line for each in module.computations.values() for line in each)
    return {shape for line in lines for _, shape in arrays(line.result)}


def uses(module, computation, name, shape):
    """(opcode, result's shape) of what finally reads a value of this shape: behind tuples and
    copies, inside fusions."""
    for line in module.computations[computation]:
        if name not in line.operands:
            continue
        if line.opcode in ("get-tuple-element", "bitcast", "copy"):
            if arrays(line.result)[0][1] == shape:
                yield from uses(module, computation, line.name, shape)
        elif line.opcode == "fusion":
            (inner,) = line.inlined
            for number, operand in enumerate(line.operands):
                if operand == name:
                    parameters = (
                        each.name
                        for each in module.computations[inner]
                        if each.opcode == "parameter" and each.rest.startswith(f"{number})")
                    )
                    yield from uses(module, inner, next(parameters), shape)
        else:
            yield line.opcode, arrays(line.result)[0][1]


def test_experts_stay_and_tokens_go_to_them():
    module, found = compiled(*ALL)
    to_experts = [each for each in found if each.kind == "all-to-all" and each.axes == ("expert",)]
    # There and back, and the same for the gradient.
    assert sum(each.count for each in to_experts) == 4
    assert all("experts_gather" in each.name for each in to_experts)
    for each in found:
        if "experts_gather" in each.name and "expert" in each.axes:
            assert each.kind == "all-to-all", each
    # Half of the experts, and of each of them half: nobody ever has more.
    assert (E // 2, M, H // 2) in shapes(module)
    for whole in ((E, M, H), (E, M, H // 2), (E // 2, M, H)):
        other = (whole[0], whole[2], whole[1])
        assert not [shape for shape in shapes(module) if shape[-3:] in (whole, other)]


def test_the_residual_stream_is_gathered_and_scattered_along_its_tokens():
    module, found = compiled(*ALL)
    rows = (B // 4, S, M)
    over_model = [each for each in found if each.axes == ("model",)]
    gathered = [each for each in over_model if each.kind == "all-gather" and rows in each.shapes]
    assert len(gathered) >= 8  # in front of attention and of the dense layer, forward and back
    # XLA for CPU writes a reduce-scatter as an all-reduce of which each device takes its part.
    num_reduced = 0
    for computation, lines in module.computations.items():
        for line in lines:
            if line.opcode != "all-reduce" or rows not in [s for _, s in arrays(line.result)]:
                continue
            for use in uses(module, computation, line.name, rows):
                assert use == ("dynamic-slice", (B // 4, S // 2, M)), line
                num_reduced += 1
    assert num_reduced >= 8  # behind both, forward and back
    # Heads stay where they are: nothing of attention's inside moves.
    layers = [each for each in over_model if "/optimizer/" not in each.name]
    inside = [each for each in layers if "BNST" in each.name or "select_n" in each.name]
    assert not inside


def test_the_slow_network_only_adds_up_gradients_and_counts():
    _, found = compiled(*ALL)
    slow = [each for each in found if "slice" in each.axes]
    assert {(each.kind, each.count) for each in slow} == {("all-reduce", 1)}
    # Once each: every part that a device has of all weights, in float32; of the table twice, as
    # embedding and as softmax.
    recipe = load_recipe("test-tiny", [*SIZES, *ALL]).recipe
    decoder, mesh = Decoder(recipe.model, recipe.moe), make_mesh(recipe.mesh)
    places = Layout.of(recipe.mesh).shardings(mesh, decoder.axes)
    num_bytes = jax.tree.map(
        lambda leaf, place: 4 * math.prod(place.shard_shape(leaf.shape)), decoder.shapes, places
    )
    own = sum(jax.tree.leaves(num_bytes))
    sent = sum(each.bytes for each in slow)
    assert own <= sent < own + num_bytes["embedding"]["table"] + 2**12


def test_logits_are_never_whole():
    module, _ = compiled(*ALL)
    assert (B // 4, S, V // 2) in shapes(module)
    assert not [shape for shape in shapes(module) if len(shape) > 2 and shape[-1] == V]


def test_microbatches_move_from_stage_to_stage_and_nothing_else_does():
    _, found = compiled(*STAGES)
    between = [each for each in found if "stage" in each.axes]
    moves = [each for each in between if each.kind == "collective-permute"]
    assert {each.axes for each in moves} == {("stage",)}
    # A microbatch of a data shard: the stages' ring and the queue, on every tick and back.
    assert {each.shapes[0][1:] for each in moves} == {(B // 4 // 4, S, M)}
    assert 4 * TICKS <= sum(each.count for each in moves) <= 4 * (TICKS + 1)
    others = [each for each in between if each.kind != "collective-permute"]
    # The embedding's gradient, norms of gradients, and what is told about the step.
    assert {each.kind for each in others} == {"all-reduce"}
    assert {each.count for each in others} == {1}


@pytest.mark.parametrize("embed", ["[]", "[data]"])
def test_stages_gather_weights_and_sum_their_gradients_once_per_step(embed):
    _, found = compiled(*STAGES, f"mesh.rules.embed={embed}")
    weight = M * H // 2  # anything that a tick exchanges is smaller: statistics
    sums = [each for each in found if each.kind in ("all-reduce", "reduce-scatter", "all-gather")]
    large = [each for each in sums if sum(map(math.prod, each.shapes)) >= weight]
    assert large
    assert {each.count for each in large} == {1}


@pytest.mark.parametrize(
    "sizes", [{"expert": 4, "model": 2}, {"expert": 2, "model": 2}, {"model": 8}], ids=str
)
def test_experts_of_one_index_are_on_the_same_devices_in_every_layer(sizes):
    recipe = load_recipe("test-tiny", [*SIZES, *EXPERTS, "model.num_layers=8"]).recipe
    mesh = make_mesh(recipe.mesh.model_copy(update={"data": "auto", **sizes}))
    decoder = Decoder(recipe.model, recipe.moe)
    layer = "expert_layer"
    weights = [
        (decoder.shapes["blocks"][layer]["ffn"][name], decoder.axes["blocks"][layer]["ffn"][name])
        for name in ("w_in", "w_out")
    ]
    for shape, axes in weights:
        assert (axes[:2], shape.shape[:2]) == (("layers", "expert"), (4, E))
        where = decoder.layout.sharding(mesh, axes).devices_indices_map(shape.shape)
        assert all(parts[0] == slice(None) for parts in where.values())  # all layers alike
        per_device = E // mesh.shape["expert"]
        for parts in where.values():
            assert len(range(*parts[1].indices(E))) == per_device
