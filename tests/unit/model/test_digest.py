import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glamcli.model import digest as digest_module
from glamcli.model.digest import digest

TREE = {
    "a": np.arange(64, dtype=np.float32).reshape(8, 8),
    "b": {"c": np.linspace(-1, 1, 16, dtype=np.float32).astype(jnp.bfloat16).reshape(2, 8)},
}


@pytest.fixture(scope="module")
def known():
    return digest(TREE)


@pytest.mark.parametrize("small_bytes", [0, digest_module.SMALL_BYTES])
def test_the_digest_does_not_depend_on_the_mesh(known, small_bytes, monkeypatch):
    monkeypatch.setattr(digest_module, "SMALL_BYTES", small_bytes)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    split = NamedSharding(mesh, PartitionSpec("x", "y"))
    assert digest(jax.tree.map(lambda leaf: jax.device_put(leaf, split), TREE)) == known
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
