"""A plan in words: arrays that are laid out alike share a line, and the mesh is a picture."""

import pytest

from glamcli.config.load import load_recipe
from glamcli.plan import words
from glamcli.plan.memory import by_group, passing, state_bytes
from glamcli.plan.words import join_names, mesh_caption

MESH = {"slice": 1, "stage": 1, "data": 4, "expert": 64, "model": 4}


@pytest.mark.parametrize(
    ("names", "one"),
    [
        (["embedding.table"], "embedding.table"),
        (
            ["blocks.dense_layer.a.key", "blocks.dense_layer.a.query"],
            "dense_layer.a.{key,query}",
        ),
        (["blocks.dense_layer.a.key", "blocks.expert_layer.a.key"], "a.key"),
        (["blocks.dense_layer.a.x", "blocks.expert_layer.b.y"], None),
        (["final.scale", "blocks.layer.a"], None),
    ],
)
def test_names_that_differ_in_few_places_become_one(names, one):
    assert join_names(names) == (one or ", ".join(names))


def test_dimensions_name_the_mesh_axes_that_split_them():
    recipe = load_recipe("glam_64b_64e").recipe
    found = {array.name: words.dims(array) for array in state_bytes(recipe, MESH).arrays}
    assert found["blocks.expert_layer.ffn.w_in"] == "[32, 64/expert, 8192/data, 32768/model]"
    assert found["blocks.expert_layer.ffn.router"] == "[32, 8192, 64]"


def test_what_passes_between_layers_is_of_one_part_of_the_batch():
    recipe = load_recipe("glam_64b_64e", ("batch.accumulate=2",)).recipe
    stream, slots = passing(recipe, MESH)
    assert words.dims(stream) == "[512/data/expert, 1024, 8192/model]"
    assert stream.bytes == 2 * 512 * 1024 * 8192 // 1024, "bfloat16, split over all devices"
    assert words.dims(slots) == "[64/expert, 512/data, 32, 8192/model]"
    assert slots.bytes == 2 * 64 * 512 * 32 * 8192 // 1024


def test_a_caption_says_what_lies_down_and_across_a_block_and_what_is_left_out():
    assert mesh_caption({**MESH, "slice": 2}, "chip", 10) == [
        "a square is a chip, a block one of 64 shards of `expert`",
        "`data` goes down and `model` across a block",
        "the first 10 are shown",
        "there are 2 of this, one per `slice`",
    ]
    flat = {**MESH, "data": 16, "expert": 1, "model": 1}
    assert mesh_caption(flat, "core", 16) == ["a square is a core, one of 16 shards of `data`"]


def test_memory_by_group_adds_up_and_no_group_is_smaller_than_its_arrays():
    recipe = load_recipe("quickstart").recipe
    shape = {"slice": 1, "stage": 1, "data": 4, "expert": 1, "model": 1}
    state = state_bytes(recipe, shape)
    moving = sum(array.bytes for array in passing(recipe, shape))
    few = by_group(recipe, state, shape, temporaries=5_503_488)  # of a TPU v4, off the chip
    assert few["gradients and activations"] == 5_503_488 < state.weights + moving
    assert "gradients" not in few
    many = by_group(recipe, state, shape, temporaries=state.weights + moving)
    assert many["gradients"] == state.weights
    assert many["activations and temporaries"] == moving
    for sizes, temporaries in ((few, 5_503_488), (many, state.weights + moving)):
        assert sum(sizes.values()) == state.total + temporaries


@pytest.mark.parametrize(
    ("days", "text"),
    [(47.63, "47.6 days"), (0.5, "12.0 hours"), (0.01, "14.4 minutes"), (1e-6, "0.086 seconds")],
)
def test_a_duration_has_the_unit_that_shows_its_figures(days, text):
    assert words.run_length(days) == text


def test_a_price_above_nothing_is_not_shown_as_nothing():
    assert [words.dollars(price) for price in (0, 0.004, 0.5, 1234)] == [
        "$0.00",
        "below $0.01",
        "$0.50",
        "$1,234",
    ]
