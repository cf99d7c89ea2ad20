"""The same scores, choices and texts on one device and on eight, however these are arranged."""

import jax
import numpy as np
import pytest

from glamcli.config import schema
from glamcli.data.tokenizer import Bytes
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.requests import make_requests
from glamcli.generate import Generator
from glamcli.model.decoder import Decoder
from glamcli.parallel.axes import GLAM
from glamcli.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow  # a dozen programs for eight devices

MODEL = schema.Model(
    num_layers=4,
    model_dim=32,
    ffn_dim=64,
    num_heads=4,
    head_dim=8,
    vocab_size=260,
    activation_dtype="float32",
)
DECODER = Decoder(MODEL, schema.Moe(num_experts=4, group_tokens=32))
SHOTS = "A stone is grey.\nA river is wet.\nThe moon is cold.\n" * 2
ITEMS = [
    *([(f"{SHOTS}Number {i} is ", end) for end in ("one", "two", "six")] for i in range(6)),
    *([(f"Question {i}:", " yes")] for i in range(5)),
]
REQUESTS = [make_requests(Bytes(), pairs, 256) or [] for pairs in ITEMS]


def answers(params):
    model = Likelihoods(DECODER, params, window=256, batch_tokens=2048, min_saved=0)
    found = [each for group in model.score(REQUESTS) for each in group]
    assert any(shape.trunk for shape in model._planner._compiled)
    generator = Generator(DECODER, params, Bytes())
    prompts = [generator.encode(text) for text in ("The moon", "A", "Seven rivers")]
    return found, [best[0] for best in generator.beams(prompts, width=2, tokens=4)]


@pytest.fixture(scope="module")
def on_one():
    params = jax.jit(DECODER.init)(jax.random.key(0))
    return params, answers(params)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"data": 2, "expert": 2, "model": 2},
        {"stage": 2, "expert": 2, "model": 2},
        {"slice": 2, "stage": 2, "data": 2},
    ],
    ids=str,
)
def test_eight_devices_score_and_generate_what_one_does(on_one, sizes):
    params, (wanted, texts) = on_one
    mesh = make_mesh(schema.Mesh(**sizes))
    # No more than this: models are asked where their weights lie.
    found, generated = answers(jax.device_put(params, GLAM.shardings(mesh, DECODER.axes)))
    for a, b in zip(found, wanted, strict=True):
        # Sums over parts of a dimension, added in another order, at log-probabilities of 1 to 10.
        np.testing.assert_allclose(a.token_nats, b.token_nats, rtol=1e-5, atol=2e-5)
        assert a.greedy == b.greedy
    for start in range(0, 18, 3):
        choices = [
            np.argmax([each.total for each in x[start : start + 3]]) for x in (found, wanted)
        ]
        assert choices[0] == choices[1]
    assert [each.ids for each in generated] == [each.ids for each in texts]
