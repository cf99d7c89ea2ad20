"""Parameters and FLOPs by arithmetic: the paper's table, and the models that are really built."""

import math

import jax
import pytest

from glamcli.config.load import load_recipe, shipped
from glamcli.config.sizes import capacity, count, flops_per_token, tokens_total
from glamcli.model.decoder import Decoder

# Total and active parameters at 32,000 and at 256,000 pieces, by the formulas in `sizes.py`.
# Against Table 4 of the paper: every row up to 8B and 137B agrees at 32,000 to the digits printed
# (1.7B/32E apart, where the paper's 20B does not follow from its shape), 64B/64E at 256,000.
TABLE = {
    "glam_0.1b": (137_846_016, 137_846_016, 309_878_016, 309_878_016),
    "glam_0.1b_16e": (548_437_248, 152_075_520, 720_469_248, 324_107_520),
    "glam_0.1b_32e": (1_001_495_808, 152_149_248, 1_173_527_808, 324_181_248),
    "glam_0.1b_64e": (1_907_612_928, 152_296_704, 2_079_644_928, 324_328_704),
    "glam_0.1b_128e": (3_719_847_168, 152_591_616, 3_891_879_168, 324_623_616),
    "glam_1.7b": (1_676_261_376, 1_676_261_376, 2_135_013_376, 2_135_013_376),
    "glam_1.7b_32e": (13_957_969_920, 1_878_374_400, 14_416_721_920, 2_337_126_400),
    "glam_1.7b_64e": (26_843_658_240, 1_879_160_832, 27_302_410_240, 2_337_912_832),
    "glam_1.7b_128e": (52_615_034_880, 1_880_733_696, 53_073_786_880, 2_339_485_696),
    "glam_1.7b_256e": (104_157_788_160, 1_883_879_424, 104_616_540_160, 2_342_631_424),
    "glam_8b": (8_721_305_600, 8_721_305_600, 9_638_809_600, 9_638_809_600),
    "glam_8b_64e": (142_943_227_904, 9_799_241_728, 143_860_731_904, 10_716_745_728),
    "glam_137b": (137_702_416_384, 137_702_416_384, 139_537_424_384, 139_537_424_384),
    "glam_64b_64e": (1_159_921_410_048, 94_769_520_640, 1_161_756_418_048, 96_604_528_640),
}


# Layers, width, feed-forward width, heads, head width, experts: Table 4, and table 1 of Expert
# Choice (arXiv 2202.09368) for the rows of 0.1B that it does not have.
SHAPES = {
    "glam_0.1b": (12, 768, 3072, 12, 64),
    "glam_1.7b": (24, 2048, 8192, 16, 128),
    "glam_8b": (32, 4096, 16384, 32, 128),
    "glam_137b": (64, 8192, 65536, 128, 128),
    "glam_64b": (64, 8192, 32768, 128, 128),
}


@pytest.mark.parametrize("name", TABLE)
def test_shapes_are_those_of_the_paper(name):
    model, moe = load_recipe(name).recipe.model, load_recipe(name).recipe.moe
    base, _, experts = name.removeprefix("glam_").partition("_")
    shape = (model.num_layers, model.model_dim, model.ffn_dim, model.num_heads, model.head_dim)
    assert shape == SHAPES[f"glam_{base}"]
    assert (None if moe is None else f"{moe.num_experts}e") == (experts or None)


@pytest.mark.parametrize("name", TABLE)
def test_sizes_are_those_of_the_table_for_both_vocabularies(name):
    small = count(load_recipe(name, ["model.vocab_size=32_000"]).recipe)
    large = count(load_recipe(name, ["model.vocab_size=256_000"]).recipe)
    assert (small.total, small.active, large.total, large.active) == TABLE[name]


def test_every_row_of_the_table_is_shipped_with_256k_pieces():
    assert {name for name in shipped("recipes") if name.startswith("glam_")} == set(TABLE)
    for name in TABLE:
        assert load_recipe(name).recipe.model.vocab_size == 256_000


@pytest.mark.parametrize("name", shipped("recipes"))
@pytest.mark.parametrize("sets", [(), ("moe=null",), ("model.position_buckets=16",)])
def test_the_built_model_has_exactly_the_counted_parameters(name, sets):
    recipe = load_recipe(name, sets, check=False).recipe
    shapes = jax.tree.leaves(Decoder(recipe.model, recipe.moe).shapes)
    assert sum(math.prod(leaf.shape) for leaf in shapes) == count(recipe).total


def test_a_token_of_switch_uses_one_expert():
    two = count(load_recipe("glam_8b_64e").recipe)
    one = count(load_recipe("glam_8b_64e", ["moe.experts_per_token=1"]).recipe)
    assert one.total == two.total
    assert 2 * one.active_experts == two.active_experts == two.experts // 32


def test_flops_of_a_small_model_by_hand():
    recipe = load_recipe(
        "test-tiny",
        [
            "model.num_layers=2",
            "batch.row_tokens=64",
            "moe.group_tokens=64",
            "model.vocab_size=300",
        ],
    ).recipe
    flops = flops_per_token(recipe)
    attention = 2 * (4 * 32 * 2 * 16)  # two layers of four matrices, N x D = 32
    dense, expert, router = 3 * 32 * 64, 2 * 32 * 64, 32 * 4
    assert flops.weights == 2 * (attention + dense + 2 * expert + router)
    assert flops.logits == 2 * 32 * 300
    # Token t attends to t positions, twice (scores and sum), in N x D multiplications, two layers.
    assert flops.scores == sum(2 * 2 * 2 * 2 * 16 * t for t in range(1, 65)) / 64
    assert flops.forward == flops.weights + flops.logits + flops.scores
    assert flops.training == 3 * flops.forward


def test_padded_flops_count_every_slot():
    moe = load_recipe("glam_8b_64e", ["moe.capacity_factor=1.0"]).recipe
    flops = flops_per_token(moe)
    assert 2 * flops.experts_padded == flops.experts  # 16 slots of 64 experts for 1,024 tokens
    uneven = load_recipe("glam_0.1b_64e", ["moe.num_experts=48", "mesh.expert=1"]).recipe
    assert uneven.moe is not None
    assert capacity(uneven.moe) == 44  # int(42.67) up to a multiple of 4
    padded = flops_per_token(uneven)
    assert padded.experts_padded == padded.experts * 48 * 44 // (2 * 1024)
    assert padded.training_padded > padded.training
    dense = flops_per_token(load_recipe("glam_8b").recipe)
    assert dense.training_padded == dense.training


def test_the_largest_model_takes_two_flops_per_active_weight():
    recipe = load_recipe("glam_64b_64e").recipe
    flops = flops_per_token(recipe)
    assert round(flops.weights / 1e9) == 189  # the paper prints 180 in all
    assert round(tokens_total(recipe) / 1e9) == 600


@pytest.mark.parametrize(
    ("tokens", "factor", "experts", "slots"),
    [
        (1024, 2.0, 64, 32),
        (1024, 1.25, 64, 20),
        (64, 1.0, 4, 16),
        (8, 1.0, 8, 4),
        (100, 1.0, 9, 12),
        (9, 2.0, 4, 4),  # int(4.5) is 4: fractions are dropped before rounding up
    ],
)
def test_capacity_is_a_multiple_of_four_and_at_least_four(tokens, factor, experts, slots):
    sets = [f"moe.group_tokens={tokens}", f"moe.capacity_factor={factor}"]
    moe = load_recipe("test-tiny", [*sets, f"moe.num_experts={experts}"], check=False).recipe.moe
    assert moe is not None
    assert capacity(moe) == slots
