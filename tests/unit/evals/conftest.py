"""A tiny random model over bytes, shared by the tests of scoring."""

import jax
import pytest

from glamcli.config import schema
from glamcli.data.tokenizer import Bytes
from glamcli.evals.run import Subject
from glamcli.model.decoder import Decoder

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
    decoder = Decoder(MODEL, schema.Moe(num_experts=4, group_tokens=32))
    params = jax.jit(decoder.init)(jax.random.key(0))
    documents = {"a": [text(i) for i in range(8)], "b": [text(20 + i) for i in range(8)]}
    return Subject(decoder, params, Bytes(), 256, {"step": 7}, lambda: documents)
