"""MFU: the operations a model needs, over the peak of its chips; worked out by hand."""

from types import SimpleNamespace

import pytest

from glamcli.config.chips import load_chips
from glamcli.config.load import load_recipe
from glamcli.train.speed import SPEED_KEYS, model_speed

# 2 layers (one of 4 experts), M 32, H 64, N x D 32, V 300, rows of 64 tokens.
RECIPE = load_recipe(
    "test-tiny",
    ["model.num_layers=2", "batch.row_tokens=64", "moe.group_tokens=64", "model.vocab_size=300"],
).recipe
# A multiplication and an addition, forward and twice backward: 6 per weight that a token meets.
ATTENTION = 2 * 4 * 32 * 32
FFN, TWO_EXPERTS, ROUTER = 3 * 32 * 64, 2 * 2 * 32 * 64, 32 * 4
SCORES = 2 * 2 * 32 * 65 / 2  # two layers, scores and sums, N x D, half of 64 + 1 positions
PER_TOKEN = 6 * (ATTENTION + FFN + TWO_EXPERTS + ROUTER + SCORES + 32 * 300)


def devices(kind: str, number: int):
    return [SimpleNamespace(device_kind=kind)] * number


@pytest.mark.parametrize(
    ("kind", "number", "chips", "peak"),
    [
        ("TPU v3", 8, 4, 123e12),  # two devices are a chip
        ("TPU v4", 8, 8, 275e12),
        ("TPU v5 lite", 8, 8, 197e12),
        ("TPU v5", 8, 8, 459e12),
        ("TPU v6 lite", 8, 8, 918e12),
        ("NVIDIA A100-SXM4-80GB", 2, 2, 312e12),
        ("NVIDIA H100 80GB HBM3", 2, 2, 989e12),
        ("NVIDIA H200", 2, 2, 989e12),
    ],
)
def test_mfu_is_the_model_s_operations_over_the_peak_of_all_chips(kind, number, chips, peak):
    speed = model_speed(RECIPE, devices(kind, number), 1e6)
    expected = (1e6 * PER_TOKEN / (chips * peak), 1e6 * PER_TOKEN, 1e6 / chips)
    assert speed == pytest.approx(dict(zip(SPEED_KEYS, expected, strict=True)), rel=1e-5)


def test_what_the_hardware_does_besides_does_not_count():
    sets = (["train.remat=none", "moe.capacity_factor=4.0"], ["train.remat=full"])
    recipes = (load_recipe("test-tiny", each).recipe for each in sets)
    one, other = (model_speed(recipe, devices("TPU v4", 1), 1.0) for recipe in recipes)
    assert one == other


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU"])
def test_a_device_without_a_known_peak_has_no_mfu(kind):
    assert model_speed(RECIPE, devices(kind, 1), 1e6) == {}


def test_a_kind_of_device_is_one_chip():
    chips = load_chips().values()
    kinds = [kind for chip in chips for kind in chip.kinds]
    assert all(chip.kinds for chip in chips)
    assert len(kinds) == len(set(kinds))
