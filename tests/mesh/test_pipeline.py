"""The pipeline's schedule by itself, over blocks that are cheap to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.config import schema
from glamcli.config.stages import PipelineSchedule
from glamcli.parallel import pipeline
from glamcli.parallel.axes import GLAM
from glamcli.parallel.mesh import make_mesh

S, M = 3, 4
AXES = {"w": ("layers", None, None), "b": ("layers", None)}


def block(layout, x_BSM, segments_BS, params, number, rows):
    """Depends on everything it is given; measures only what is real."""
    del layout, rows
    real_BS = segments_BS != 0
    y_BSM = jnp.tanh(jnp.einsum("BSM,MN->BSN", x_BSM, params["w"]) + params["b"][None, None])
    y_BSM = jnp.where(real_BS[..., None], y_BSM, x_BSM)
    measured = {
        "squares": jnp.sum(jnp.where(real_BS[..., None], y_BSM**2, 0.0)),
        "tokens": jnp.sum(real_BS, dtype=jnp.int32),
        "number": (number + 1) * jnp.sum(real_BS, dtype=jnp.int32),
    }
    return x_BSM + 0.2 * y_BSM, measured


def in_a_row(blocks, x_BSM, segments_BS):
    def one(x_BSM, part):
        return block(GLAM, x_BSM, segments_BS, *part, None)

    numbers = jnp.arange(blocks["b"].shape[0], dtype=jnp.int32)
    return jax.lax.scan(one, x_BSM, (blocks, numbers))


def loss(run, blocks, x_BSM, segments_BS):
    y_BSM, measured = run(blocks, x_BSM, segments_BS)
    weight_BSM = jnp.arange(y_BSM.size, dtype=jnp.float32).reshape(y_BSM.shape) / y_BSM.size
    scale_L = jnp.arange(1.0, measured["squares"].shape[0] + 1, dtype=jnp.float32)
    total = jnp.sum(weight_BSM * y_BSM) + jnp.sum(scale_L * measured["squares"])
    return total, (y_BSM, measured)


@pytest.mark.parametrize(
    ("schedule", "sizes", "group_rows"),
    [
        (PipelineSchedule(stages=2, microbatches=2, repeats=1), {"data": 4}, 1),
        (PipelineSchedule(stages=2, microbatches=6, repeats=3), {"data": 2, "model": 2}, 1),
        (PipelineSchedule(stages=4, microbatches=8, repeats=2), {"slice": 2}, 1),
        (PipelineSchedule(stages=4, microbatches=4, repeats=1), {"data": 2}, 2),
        (PipelineSchedule(stages=2, microbatches=4, repeats=2), {"data": 2, "expert": 2}, 1),
        (
            PipelineSchedule(stages=2, microbatches=4, repeats=1),
            {"data": 4},
            2,
        ),  # parts without copies
    ],
    ids=str,
)
def test_a_pipeline_computes_what_its_blocks_compute_in_a_row(schedule, sizes, group_rows):
    num_blocks, rows = 2 * schedule.stages * schedule.repeats, 4 * schedule.microbatches
    keys = jax.random.split(jax.random.key(0), 4)
    blocks = {
        "w": 0.2 * jax.random.normal(keys[0], (num_blocks, M, M)),
        "b": 0.2 * jax.random.normal(keys[1], (num_blocks, M)),
    }
    x_BSM = jax.random.normal(keys[2], (rows, S, M))
    segments_BS = jax.random.bernoulli(keys[3], 0.8, (rows, S)).astype(jnp.int32)

    def stages(blocks, x_BSM, segments_BS):
        return pipeline.run_stages(
            schedule,
            GLAM,
            block,
            blocks,
            AXES,
            x_BSM,
            segments_BS,
            group_rows,
            remat=jax.checkpoint,
            unroll=False,
        )

    def both(run):
        grad = jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)
        return jax.jit(lambda *args: grad(run, *args))(blocks, x_BSM, segments_BS)

    expected = both(in_a_row)
    mesh = make_mesh(schema.Mesh(stage=schedule.stages, **{"data": 1, **sizes}))
    with jax.set_mesh(mesh):
        found = both(stages)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [({"data": 4}, 4), ({"data": 2, "expert": 2}, 2), ({"slice": 2, "data": 2}, 4)],
    ids=str,
)
def test_every_block_sees_every_number_of_rows_once_and_no_axis_that_has_copies(sizes, copies):
    schedule = PipelineSchedule(stages=2, microbatches=4, repeats=2)
    seen = []

    def numbered(layout, x_BSM, segments_BS, params, number, rows):
        del segments_BS, params, number
        seen.append(layout)
        counts = jnp.zeros(4 * copies, jnp.int32).at[rows].add(1)
        return x_BSM, {"counts": counts}

    x_BSM, segments_BS = jnp.ones((16, S, M)), jnp.ones((16, S), jnp.int32)
    blocks = {"w": jnp.ones((4, M, M)), "b": jnp.ones((4, M))}
    rest = {"group_rows": 1, "remat": lambda f: f, "unroll": False}
    mesh = make_mesh(schema.Mesh(stage=2, **{"data": 1, **sizes}))
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda *arrays: pipeline.run_stages(
                schedule, GLAM, numbered, blocks, AXES, *arrays, **rest
            )
        )
        _, measured = run(x_BSM, segments_BS)
    np.testing.assert_array_equal(measured["counts"], np.ones((4, 4 * copies)))
    (inner,) = set(seen)
    assert inner.split("batch") == inner.split("embed") == ("expert",)
    assert inner.split("expert_embed") == ()
    assert inner.split("mlp") == GLAM.split("mlp")


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("repeats", [2, 3, 4, 5, 8, 12])
def test_every_weight_moves_to_its_stage_and_no_two_collide(stages, repeats):
    send_PI, to_PI, repeat_PI = pipeline._moves(stages, repeats)
    got = {}
    for j in range(repeats):
        assert sorted(to_PI[:, j]) == list(range(stages))
        for p in range(stages):
            receiver = to_PI[p, j]
            got[receiver, repeat_PI[receiver, j]] = p * repeats + send_PI[p, j]
    assert got == {(p, r): r * stages + p for p in range(stages) for r in range(repeats)}


def test_the_bubble_in_both_conventions():
    gpipe = PipelineSchedule(stages=4, microbatches=16, repeats=1)
    assert gpipe.ticks == 19
    assert gpipe.bubble_of_ideal == pytest.approx(3 / 16)  # Megatron-LM: (p - 1) / m
    assert gpipe.bubble_of_total == pytest.approx(3 / 19)
    circular = PipelineSchedule(stages=4, microbatches=16, repeats=2)
    assert circular.bubble_of_ideal == pytest.approx(3 / 32)  # (p - 1) / (v m)
    assert circular.bubble_of_total == pytest.approx(3 / (2 * 16 + 3))
