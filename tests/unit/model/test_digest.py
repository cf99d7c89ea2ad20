import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glamcli.model import digest as digest_module
from glamcli.model.digest import digest, digests

TREE = {
    "a": np.arange(64, dtype=np.float32).reshape(8, 8),
    "odd": np.arange(8 * 8 * 3, dtype=np.int32).reshape(8, 8, 3),
    "b": {"c": np.linspace(-1, 1, 16, dtype=np.float32).astype(jnp.bfloat16).reshape(8, 2)},
}


@pytest.fixture(scope="module")
def known():
    return digest(TREE)


@pytest.mark.parametrize("spec", [("x", "y"), ("y",), (("y", "x"), None), (None, "x")])
@pytest.mark.parametrize("small_bytes", [0, digest_module.SMALL_BYTES])
def test_the_digest_does_not_depend_on_the_mesh(known, small_bytes, spec, monkeypatch):
    monkeypatch.setattr(digest_module, "SMALL_BYTES", small_bytes)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    split = NamedSharding(mesh, PartitionSpec(*spec))
    assert digest({**TREE, **jax.device_put({"a": TREE["a"], "odd": TREE["odd"]}, split)}) == known
    assert digest(jax.device_put(TREE, jax.devices()[3])) == known


def test_a_flipped_bit_and_a_swap_change_the_digest(known):
    flipped = TREE["a"].copy()
    flipped.view(np.uint32)[3, 5] ^= 1
    swapped = TREE["a"][[1, 0, *range(2, 8)]]
    turned = np.ascontiguousarray(TREE["a"].T)
    found = {digest({**TREE, "a": each}) for each in (flipped, swapped, turned)}
    assert len(found) == 3
    assert known not in found
    assert digest({"z": TREE["a"], "b": TREE["b"]}) != known


def test_any_flipped_bit_changes_both_sums():
    """For certain: a hash is a bijection, and an odd factor loses nothing."""
    x = np.random.default_rng(0).standard_normal((16, 24), np.float32)
    x[:2] = 0
    (before,) = digests({"x": jnp.asarray(x)}).values()
    for place in range(0, x.size, 7):
        for bit in range(32):
            flipped = x.copy()
            flipped.view(np.uint32).flat[place] ^= np.uint32(1 << bit)
            (after,) = digests({"x": jnp.asarray(flipped)}).values()
            assert before[0] != after[0]
            assert before[1] != after[1]


def test_a_negated_row_a_block_of_zeros_and_two_flipped_signs_are_noticed():
    x = np.random.default_rng(0).standard_normal((16, 24), np.float32)
    negated, zeros, signs = x.copy(), x.copy(), x.copy()
    negated[3] *= -1
    zeros[2:5] = 0
    signs.flat[[5, 77]] *= -1
    found = [digests({"x": jnp.asarray(each)})["x"] for each in (x, negated, zeros, signs)]
    for lane in range(2):
        assert len({sums[lane] for sums in found}) == 4
