"""A tiny random model over bytes, shared by the tests of scoring."""

import jax
import pytest

from glamcli.config import schema
from glamcli.data.tokenizer import Bytes
from glamcli.model.decoder import Decoder
from glamcli.trained import Trained

MODEL = schema.Model(
    num_layers=2,
    model_dim=32,
    ffn_dim=64,
    num_heads=2,
    head_dim=16,
    vocab_size=259,
    activation_dtype="float32",
)


def text(seed: int) -> str:
    words = ["stone", "river", "light", "house", "green", "seven", "water", "paper", "moon", "sun"]
    return " ".join(words[(seed * 7 + i * i * (seed + 3) + i // 5) % 10] for i in range(300))


@pytest.fixture(scope="session")
def subject():
    moe = schema.Moe(num_experts=4, group_tokens=32)
    batch = schema.Batch(rows=1, row_tokens=256)
    data = schema.Data(mixture="none")
    recipe = schema.Recipe(
        model=MODEL, moe=moe, batch=batch, train=schema.Train(steps=7), data=data
    )
    decoder = Decoder(MODEL, moe)
    params = jax.jit(decoder.init)(jax.random.key(0))
    documents = {"a": [text(i) for i in range(8)], "b": [text(20 + i) for i in range(8)]}
    return Trained(recipe, decoder, params, Bytes(), {"step": 7}, lambda: documents)
