"""The loss of a fixed small model from a fixed key, kept in git.

A change of architecture, initial values or routing order moves these numbers. When that is
intended, refresh them with `python tests/golden/test_model_loss.py` and say why in the commit.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config import schema
from glamcli.model.decoder import Decoder

FILE = Path(__file__).with_name("model_loss.json")
MOE = schema.Moe(num_experts=8, group_tokens=32, capacity_factor=1.0)
CASES = {
    "dense": (None, {}),
    "dense sqrt without zero logit": (None, {"attention_scale": "sqrt", "zero_logit": False}),
    "experts": (MOE, {}),
    "switch": (MOE.model_copy(update={"experts_per_token": 1}), {}),
}


def losses(moe: schema.Moe | None, changes: dict) -> dict[str, float]:
    sizes = {"num_layers": 4, "model_dim": 32, "ffn_dim": 64, "num_heads": 4, "head_dim": 16}
    model = schema.Model(**sizes, vocab_size=96, activation_dtype="float32", **changes)
    decoder = Decoder(model, moe)
    numbers = np.random.default_rng(2112).integers(0, 96, (2, 33), dtype=np.int32)
    segments = np.array([[1] * 20 + [2] * 12, [1] * 27 + [0] * 5], np.int32)

    @jax.jit
    def run(key):
        params = decoder.init(key)
        x_BSM, stats = decoder.hidden(params, numbers[:, :-1], segments, dispatch=moe and "gather")
        nats_BS, logz_BS = decoder.losses(params, x_BSM, numbers[:, 1:])
        real_BS = segments != 0
        found = {
            "nats_per_target": jnp.mean(nats_BS, where=real_BS),
            "logz_squared": jnp.mean(logz_BS**2, where=real_BS),
        }
        if moe is not None:
            found["balance_loss"] = jnp.sum(stats["balance_loss"])
            found["dropped_frac"] = jnp.mean(stats["dropped_frac"])
        return found

    return {name: float(value) for name, value in run(jax.random.key(7)).items()}


@pytest.mark.parametrize("name", CASES)
def test_loss_from_a_fixed_key_is_the_one_in_git(name):
    expected = json.loads(FILE.read_text())[name]
    assert losses(*CASES[name]) == pytest.approx(expected, rel=2e-6)


if __name__ == "__main__":
    numbers = {name: losses(*case) for name, case in CASES.items()}
    FILE.write_text(json.dumps(numbers, indent=2) + "\n")
