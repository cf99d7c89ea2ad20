"""The training state: same values on every mesh, and never whole on one device."""

import dataclasses

import jax
import numpy as np
import pytest

from glamcli.config.schema import Mesh, Model, Moe, Optimizer
from glamcli.model.decoder import Decoder
from glamcli.model.params import stack_blocks, unstack_blocks
from glamcli.parallel.mesh import make_mesh
from glamcli.train.state import abstract_state, init_state, state_axes

MODEL = Model(num_layers=2, model_dim=16, ffn_dim=32, num_heads=2, head_dim=8, vocab_size=64)
DECODER = Decoder(MODEL, Moe(num_experts=4))
SETTINGS = Optimizer(factored_min_dim=8)


def test_a_state_made_on_a_mesh_is_split_there_and_holds_the_same_numbers():
    mesh = make_mesh(Mesh(data=2, expert=2, model=2))
    alone = init_state(DECODER, SETTINGS, seed=5)
    split = init_state(DECODER, SETTINGS, seed=5, mesh=mesh)
    want = abstract_state(DECODER, SETTINGS, mesh)
    for a, b, leaf in zip(*(jax.tree.leaves(s) for s in (alone, split, want)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.sharding == leaf.sharding
        assert (b.shape, b.dtype) == (leaf.shape, leaf.dtype)
    w_in = split.params["blocks"]["expert_layer"]["ffn"]["w_in"]
    assert w_in.addressable_shards[0].data.size == w_in.size // 8
    v_row = split.opt_state["slots"]["blocks"]["expert_layer"]["ffn"]["w_in"]["v_row"]
    assert v_row.addressable_shards[0].data.size == v_row.size // 4


@pytest.mark.slow
def test_blocks_apart_start_with_the_same_numbers_and_can_be_stacked():
    model = MODEL.model_copy(update={"num_layers": 4})
    decoder = Decoder(model, Moe(num_experts=4))
    each = init_state(dataclasses.replace(decoder, apart=True), SETTINGS, seed=5)
    assert each.params["blocks"][1]["expert_layer"]["ffn"]["w_in"].shape == (4, 16, 32)
    stacked = init_state(decoder, SETTINGS, seed=5)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(stack_blocks)(each), stacked)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked, decoder.num_blocks), each)


def test_every_leaf_has_axes():
    axes = jax.tree.leaves(state_axes(DECODER, SETTINGS), is_leaf=lambda x: x == () or _names(x))
    shapes = jax.tree.leaves(abstract_state(DECODER, SETTINGS))
    assert [len(names) for names in axes] == [leaf.ndim for leaf in shapes]


def _names(x):
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)
