"""Names of targets: what they stand for, and what is said of those there are not."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from glamcli import libtpu
from glamcli.config.chips import CHIPS_FILE, load_chips
from glamcli.errors import PlanError
from glamcli.plan import topology
from glamcli.plan.network import Network
from glamcli.plan.topology import parse_target

CHIPS = load_chips()


@pytest.mark.parametrize(
    ("name", "chips", "devices", "grid"),
    [
        ("v4-2048", 1024, 1024, (8, 8, 16)),  # v4 names count cores
        ("v4-8", 4, 4, (2, 2, 1)),
        ("V5P-1024", 512, 512, (8, 8, 8)),
        ("v3-32", 16, 32, (4, 4)),  # both cores are devices
        ("v5e-64", 64, 64, (8, 8)),  # v5e names count chips
        ("v5litepod-8", 8, 8, (2, 4)),
        ("v6e-1", 1, 1, (1, 1)),
        ("7x-128", 64, 128, (4, 4, 4)),
        ("2xv5e-256", 512, 512, (16, 16)),
        ("8xh100", 8, 8, ()),
    ],
)
def test_names_say_how_many_chips(name, chips, devices, grid):
    target = parse_target(name, CHIPS)
    assert (target.num_chips, target.num_devices, target.shape) == (chips, devices, grid)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v9-8", "did you mean `v4-8`?"),
        ("v4_2048", "did you mean `v4-2048`?"),
        ("h100", "did you mean `8xh100`?"),
        ("v5e-48", "the nearest sizes are `v5e-32` or `v5e-64`"),
        ("v4-2047", "the nearest sizes are `v4-1024` or `v4-2048`"),
        ("0xv5e-4", "did you mean `v5e-4`?"),
        ("moon", "for example `v4-2048`"),
    ],
)
def test_a_name_that_is_not_there_comes_with_one_that_is(name, hint):
    with pytest.raises(PlanError) as caught:
        parse_target(name, CHIPS)
    assert f"`{name}`" in caught.value.what
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["v5e-0", "v4-0", "v5e-2", "v6e-48"])
def test_a_slice_without_a_grid_is_refused(name):
    with pytest.raises(PlanError, match="there is no slice"):
        parse_target(name, CHIPS)


def test_every_offered_slice_has_its_chips():
    for chip in CHIPS.values():
        for size in topology.slice_sizes(chip):
            target = topology.target_of(chip, size)
            assert target.num_chips == size
            assert parse_target(target.name, CHIPS) == target


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[v4\n", "is not a table of chips"),
        ("[v4]\nfamily = 'tpu'\n", "missing"),
        (None, "cannot"),
        ("v4 = 'fast'\n", "`v4` is not a section"),
        (CHIPS_FILE.read_text().replace("link = ", "link = -"), "link` is -"),
        (CHIPS_FILE.read_text().replace("torus = ", "torus = 0.5 # "), "`torus`: "),
        (CHIPS_FILE.read_text().replace("forward = 0.24", "forward = 1.24"), "forward` is 1.24"),
    ],
)
def test_a_broken_table_of_chips_is_named(tmp_path: Path, text, what):
    path = tmp_path / "chips.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=what) as caught:
        load_chips(path)
    assert str(path) in caught.value.what


def test_axes_that_fill_a_dimension_are_rings_and_others_lines():
    shape = {"slice": 1, "stage": 1, "data": 4, "expert": 64, "model": 4}
    network = Network(parse_target("v4-2048", CHIPS), None, shape)  # 8 x 8 x 16
    link = CHIPS["v4"].link
    assert network.rate(("model",))[0] == link  # a quarter of the long dimension
    assert network.rate(("data", "expert"))[0] > network.rate(("model",))[0]
    between = Network(parse_target("2xv5e-256", CHIPS), None, shape | {"slice": 2, "data": 1})
    assert between.rate(("slice",))[0] == CHIPS["v5e"].dcn


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["v2-8", "v3-8", "v4-8", "v5e-4", "v5p-8", "v6e-4", "7x-8"])
def test_the_table_knows_what_the_compiler_lets_a_program_have(name):
    libtpu.quiet()
    target = parse_target(name, CHIPS)
    assert target.chip is not None
    device = topology.devices(target)[0]
    assert device.device_kind in target.chip.kinds
    place = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((60, 2**30), jnp.float32, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: (x @ x.T) @ x).lower(x).compile()
    said = re.search(r"(?:available HBM \(|of )([\d.]+)([MG]?)", str(caught.value))
    assert said is not None
    size = float(said[1]) * {"": 1, "M": 2**20, "G": 2**30}[said[2]]
    assert size == pytest.approx(target.chip.usable_bytes, rel=1e-4)
