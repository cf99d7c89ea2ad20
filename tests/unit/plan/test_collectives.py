from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from glamcli.plan.collectives import Collective, collectives

AXES = {"data": 2, "expert": 2, "model": 2}


def compiled(body):
    """The program's text: `body` on each device's part of an array split over every axis."""
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Auto,) * 3)
    split = PartitionSpec(tuple(AXES))
    run = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, split))
    return jax.jit(run).lower(x).compile().as_text()


def only(hlo) -> Collective:
    (found,) = collectives(hlo, AXES)
    return found


@pytest.mark.parametrize(
    "axes",
    [("data",), ("expert",), ("model",), ("data", "expert"), ("data", "model"), tuple(AXES)],
    ids="-".join,
)
def test_every_kind_is_found_with_its_axes_and_bytes(axes):
    group = 2 ** len(axes)
    # Each device holds one row of eight float32 numbers.
    for kind, body, num_bytes in (
        ("all-reduce", lambda x: jax.lax.psum(x, axes), 32),
        ("all-gather", lambda x: jax.lax.all_gather(x, axes), 32 * group),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x[0], axes, tiled=True), 32),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, axes, 1, 0, tiled=True), 32),
    ):
        found = only(compiled(body))
        assert (found.kind, found.axes, found.group) == (kind, axes, group)
        assert (found.bytes, found.count) == (num_bytes, 1), kind


def test_a_permutation_runs_over_the_axes_it_crosses():
    found = only(compiled(lambda x: jax.lax.ppermute(x, "expert", [(0, 1), (1, 0)])))
    assert (found.kind, found.axes, found.bytes) == ("collective-permute", ("expert",), 32)


def test_collectives_of_one_kind_are_counted_each():
    def body(x):  # all that `shard_map` asks for have the same channel
        return (
            jax.lax.psum(x, "model"),
            jax.lax.psum(jnp.sin(x), "data"),
            jax.lax.ppermute(x, "model", [(0, 1), (1, 0)]),
            jax.lax.ppermute(jnp.cos(x), "model", [(0, 1), (1, 0)]),
        )

    found = collectives(compiled(body), AXES)
    assert [each.kind for each in found].count("collective-permute") == 2
    assert {("all-reduce", ("model",)), ("all-reduce", ("data",))} <= {
        (each.kind, each.axes) for each in found
    }


def test_rounds_of_loops_inside_loops_are_multiplied():
    def body(x):
        def inner(x, _):
            return jax.lax.psum(x, "model") / 2, None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, length=5)
            return jax.lax.psum(x, "data"), None

        return jax.lax.scan(outer, x, length=3)[0]

    counts = {each.axes: each.count for each in collectives(compiled(body), AXES)}
    assert counts == {("model",): 15, ("data",): 3}


def test_names_of_scopes_are_kept():
    def body(x):
        with jax.named_scope("here"):
            return jax.lax.psum(x, "model")

    assert "/here/" in only(compiled(body)).name


def test_a_program_of_one_device_says_nothing():
    assert collectives(jax.jit(jnp.sin).lower(1.0).compile().as_text(), {"data": 1}) == []
    with pytest.raises(ValueError, match="HLO"):
        collectives("not a program", {})


HEAD = "HloModule m\n\nENTRY %main (p: f32[2,4]) -> f32[2,4] {\n  %p = f32[2,4]{1,0} parameter(0)\n"
line = partial("{0}  ROOT %r = {1}\n}}\n".format, HEAD)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("model",)),
        ("{}", ("data", "expert", "model")),
        ("[2,4]<=[8]", ("expert", "model")),
        ("[4,2]<=[4,2]T(1,0)", ("expert",)),  # groups of 0 and 2, 4 and 6, ...
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", ("model",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "expert")),
        ("mesh['x'=2,'y'=2,'z'=2], device_ids=([2,2,2]T(2,1,0)) {'x'}", ("model",)),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,2,2]T(2,1,0)) {'axis_0':(2)2}", ("expert",)),
        ("mesh['x'=4,'y'=2] {'x':(1)2,'y'}", ("data", "model")),
    ],
)
def test_groups_are_read_in_every_form_that_xla_writes(groups, axes):
    text = line(
        f"f32[2,4]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%a"
    )
    assert only(text).axes == axes


def test_started_collectives_and_tpu_forms_are_counted_once():
    started = line(
        "((f32[2,4]{1,0:T(2,128)}), (f32[8,4]{1,0:T(8,128)S(1)})) all-gather-start(%p), "
        "channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}"
    )
    assert (only(started).kind, only(started).bytes) == ("all-gather", 128)
    scattered = (
        "HloModule m\n\n%all-reduce-scatter.1 (q: f32[8,4]) -> f32[2,4] {\n"
        "  %q = f32[8,4]{1,0} parameter(0)\n"
        "  %a = f32[8,4]{1,0} all-reduce(%q), channel_id=3, replica_groups=[2,4]<=[8]\n"
        "  ROOT %s = f32[2,4]{1,0} dynamic-slice(%a), dynamic_slice_sizes={2,4}\n}\n\n"
        "ENTRY %main (p: f32[8,4]) -> f32[2,4] {\n  %p = f32[8,4]{1,0} parameter(0)\n"
        "  ROOT %f = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
    )
    assert (only(scattered).kind, only(scattered).bytes) == ("reduce-scatter", 128)


def test_a_loop_without_a_note_counts_to_what_its_condition_compares_with():
    loop = (
        "HloModule m\n\n%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {\n"
        "  %t = (s32[], f32[4]{0}) parameter(0)\n"
        "  %g = f32[4]{0} get-tuple-element(%t), index=1\n"
        "  %a = f32[4]{0} all-reduce(%g), channel_id=3, replica_groups=[2,4]<=[8]\n}\n\n"
        "%cond (t: (s32[], f32[4])) -> pred[] {\n  %c = s32[]{:T(128)} constant(7)\n"
        "  %i = s32[] get-tuple-element(%t), index=0\n"
        "  ROOT %lt = pred[] compare(%i, %c), direction=LT\n}\n\n"
        "ENTRY %main (p: (s32[], f32[4])) -> (s32[], f32[4]) {\n"
        "  %p = (s32[], f32[4]{0}) parameter(0)\n"
        "  ROOT %w = (s32[], f32[4]{0}) while(%p), condition=%cond, body=%body\n}\n"
    )
    assert only(loop).count == 7
