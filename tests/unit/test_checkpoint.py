"""What a checkpoint promises: exact bits, any number of devices, nothing torn, nothing cast."""

import asyncio
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glamcli.checkpoint import Checkpoints
from glamcli.config.schema import Optimizer
from glamcli.errors import CheckpointError, DamagedCheckpoint, SaveFailed
from glamcli.orbax_setup import ignore_abandoned_work
from glamcli.restore import restore_params
from glamcli.step_folders import CHECKPOINT_FORMAT, checksum, damaged_steps, find_step, find_steps
from glamcli.stored_arrays import verify
from glamcli.train.optimizer import checked_update, init_opt_state
from unit.full_disk import save_without_room


class Moments(NamedTuple):
    count: jax.Array
    mean: dict[str, jax.Array]


def mesh(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), ("data",))


def put(value, num_devices: int, *axes):
    return jax.device_put(value, NamedSharding(mesh(num_devices), PartitionSpec(*axes)))


def state(step: int, num_devices: int = 8):
    """Every word depends on the step, so restored bits tell where they came from."""
    words = np.random.default_rng(step).standard_normal((16, 8), np.float32)
    return {
        "params": {
            "layers": {"w": put(words, num_devices, "data")},
            "bias": put(jnp.asarray(words[:3, 0], jnp.bfloat16), num_devices),
        },
        "opt_state": (Moments(put(np.int32(step), num_devices), {"w": put(-words, num_devices)}),),
        "step": put(np.int32(step), num_devices),
    }


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
    """A folder that holds steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"recipe": {"seed": step}})
    checkpoints.close()
    return checkpoints


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_restores_the_same_bits_onto_any_number_of_devices(saved, num_devices):
    target = state(3, num_devices)
    restored = saved.restore(3, abstract(target))
    assert_same_bits(restored, target)
    for wanted, got in zip(jax.tree.leaves(target), jax.tree.leaves(restored), strict=True):
        assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)


def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path):
    @jax.jit
    def zeroed(tree):
        return jax.tree.map(jnp.zeros_like, tree)

    overwrite = jax.jit(zeroed, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 4):
        live = state(step)
        checkpoints.save(step, live, {})
        overwrite(live)
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(step, abstract(state(step))), state(step))
    checkpoints.close()


def test_keeps_the_newest_and_leaves_no_trash(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        checkpoints.save(step, state(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [20, 15]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["15", "20"]
    checkpoints.close()


def test_a_later_step_on_disk_makes_saving_an_earlier_one_an_error(saved):
    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        saved.save(2, state(2), {})
    saved.close()


def test_meta_says_which_run_saved_it(saved):
    meta = saved.meta(2)
    assert meta["step"] == 2
    assert meta["recipe"] == {"seed": 2}
    assert meta["tree"]["params/layers/w"] == ["float32", [16, 8]]


def empty(folder: Path) -> None:
    (folder / "9").mkdir()


def half_copied(folder: Path) -> None:
    shutil.copytree(folder / "3", folder / "9")
    (folder / "9" / "state" / "_METADATA").unlink()


def renamed(folder: Path) -> None:
    shutil.copytree(folder / "3", folder / "9")


def linked(folder: Path) -> None:
    (folder / "9").symlink_to(folder / "3")


def linked_inside(folder: Path) -> None:
    shutil.copytree(folder / "3", folder / "9")
    (folder / "9" / "state").rename(folder.parent / "elsewhere")
    (folder / "9" / "state").symlink_to(folder.parent / "elsewhere")
    rewrite_meta(folder / "9", step=9)


def unreadable_meta(folder: Path) -> None:
    shutil.copytree(folder / "3", folder / "9")
    (folder / "9" / "meta" / "metadata").write_text('{"step": 9')


def of_format(version: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shutil.copytree(folder / "3", folder / "9")
        rewrite_meta(folder / "9", step=9, format=version)

    return damage


def rewrite_meta(folder: Path, **changes) -> None:
    """Another description, complete as a version of the program would have written it."""
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text()) | changes
    if meta["format"] < 4:
        meta = {name: meta[name] for name in meta.keys() - {"digests", "checksum"}}
    else:
        meta["checksum"] = checksum(meta)
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (empty, "missing or half written"),
        (half_copied, "missing or half written"),
        (renamed, "holds step 3"),
        (linked, "not a folder"),
        (linked_inside, "a link to elsewhere"),
        (unreadable_meta, "cannot be read"),
        (of_format(1), "by an older version"),
    ],
)
def test_only_complete_steps_are_candidates(saved, damage, reason):
    damage(saved.folder)
    assert saved.latest() == 3
    assert reason in damaged_steps(saved.folder)["9"]
    with pytest.raises(CheckpointError, match=reason):
        saved.restore(9, abstract(state(3)))
    # And they do not stop later saves, as they would if orbax saw them.
    saved.save(4, state(4), {})
    saved.close()
    assert saved.latest() == 4
    assert "9" not in {p.name for p in saved.folder.iterdir()}


def test_leftovers_of_a_killed_save_are_removed_by_the_next_one(saved):
    (saved.folder / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (saved.folder / "trash" / "1").mkdir(parents=True)
    assert saved.steps() == [3, 2, 1]
    saved.save(4, state(4), {})
    saved.close()
    assert sorted(p.name for p in saved.folder.iterdir()) == ["2", "3", "4"]


@pytest.mark.parametrize("text", ["[1]", '{"init_timestamp_nsecs": "x"}', "", "\0"])
def test_a_damaged_file_of_orbax_about_a_step_stops_neither_saves_nor_restores(saved, text):
    (saved.folder / "3" / "_CHECKPOINT_METADATA").write_text(text)
    saved.save(4, state(4), {})
    saved.close()
    for step in (3, 4):
        assert_same_bits(saved.restore(step, abstract(state(step))), state(step))


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_jumps_a_day_whenever_it_is_read_costs_no_save(saved, monkeypatch, days):
    now, reads = time.time(), itertools.count()

    def jumping() -> float:
        return now + days * 86_400 * next(reads)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    for step in (4, 5):
        saved.save(step, state(step), {})
        assert saved.wait() == step
    assert next(reads) > 10
    assert saved.steps() == [5, 4, 3]
    saved.close()


def test_differences_are_named_before_anything_is_read(saved):
    target = abstract(state(3))
    w = target["params"]["layers"].pop("w")
    target["params"]["layers"]["v"] = w
    target["params"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=w.sharding)
    target["step"] = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=w.sharding)
    shutil.rmtree(saved.folder / "3" / "state" / "d")
    with pytest.raises(CheckpointError) as caught:
        saved.restore(3, target)
    assert "4 arrays differ" in caught.value.what
    assert "`params/bias` is bfloat16[3], not float32[3]" in caught.value.what
    assert "`params/layers/v` is absent, not float32[16, 8]" in caught.value.what
    assert "`step` is int32[], not int32[2]" in caught.value.what


def training(dim, settings, seed=0):
    """The state of an optimizer over one attention and one norm weight, after one update."""
    axes = {"attention": {"query": ("layers", "embed", "heads", "head_dim")}, "scale": ("layers",)}
    rng = np.random.default_rng(seed)
    shapes = {"attention": {"query": (2, 16, 4, dim)}, "scale": (2,)}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    opt_state = init_opt_state(settings, axes, params)
    _, opt_state, _, _ = checked_update(settings, axes, params, opt_state, params)
    return put({"params": params, "opt_state": opt_state}, 1)


@pytest.mark.parametrize(("dim", "num_anew"), [(6, 2), (8, 1)])
def test_weights_of_format_2_are_carried_over_and_what_starts_anew_is_said(tmp_path, dim, num_anew):
    """Then heads were factored apart from their width, or not at all where that is small."""
    old = training(dim, Optimizer(factored_min_dim=8, factor_heads="separate"))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, old, {})
    checkpoints.close()
    assert checkpoints.meta(1)["format"] == CHECKPOINT_FORMAT
    rewrite_meta(tmp_path / "1", format=2)
    assert_same_bits(checkpoints.restore(1, abstract(old)), old)  # nothing to say

    new = training(dim, Optimizer(factored_min_dim=8), seed=1)
    said = []
    restored = checkpoints.restore(1, abstract(new), said.append)
    assert_same_bits(restored["params"], old["params"])
    slots, before = restored["opt_state"]["slots"], old["opt_state"]["slots"]
    assert_same_bits(slots["scale"], before["scale"])
    query = slots["attention"]["query"]
    assert jax.tree.map(jnp.shape, query) == {"v_row": (2, 16), "v_col": (2, 4, dim)}
    assert sum(not np.asarray(x).any() for x in query.values()) == num_anew
    assert len(said) == 1
    assert "statistics of 1 attention weights start from zero" in said[0]

    new["params"]["scale"] = put(jnp.zeros(3), 1)
    with pytest.raises(CheckpointError, match="1 arrays differ"):
        checkpoints.restore(1, abstract(new), said.append)


def test_a_failed_background_save_is_reported_by_poll_and_leaves_nothing(saved):
    large = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(10_000), jnp.float32)}
    save_without_room(saved, 5, large)
    with pytest.raises(CheckpointError, match="saving step 5 failed: File too large") as caught:
        saved.poll()
    assert caught.value.hint == "step 3 is complete"
    assert sorted(p.name for p in saved.folder.iterdir()) == ["1", "2", "3"]
    saved.close()


FAILS_TO_SAVE = """
import gc, os, sys, time, numpy as np, jax.numpy as jnp
from pathlib import Path
from glamcli.checkpoint import Checkpoints
from glamcli.errors import CheckpointError
from orbax.checkpoint._src.multihost import multihost
from unit.full_disk import save_without_room
multihost.coordination_timeout = lambda: 1  # not 5 minutes for the threads of a failed save
saved = Checkpoints(Path(sys.argv[1]))
random = np.random.default_rng(0)
state = {f"w{i}": jnp.asarray(random.standard_normal(9999)) for i in range(20)}
try:
    if sys.argv[2] == "later":
        save_without_room(saved, 5, state)
        saved.poll()
    else:
        def mkdir(path, *arguments, **names):
            raise OSError(27, "File too large", str(path))
        saved._open()
        os.mkdir = mkdir
        saved.save(5, state, {})
        saved.wait()
except CheckpointError as error:
    print(error.what)
time.sleep(2)
saved._manager = None
gc.collect()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_failed_save_prints_nothing_of_the_libraries(tmp_path, when):
    ended = subprocess.run(
        [sys.executable, "-c", FAILS_TO_SAVE, str(tmp_path), when],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout == "saving step 5 failed: File too large\n"
    assert "Traceback" not in ended.stderr
    assert "never awaited" not in ended.stderr


def test_of_writes_that_failed_after_the_save_had_nothing_is_told(caplog):
    ignore_abandoned_work()
    loop = asyncio.new_event_loop()
    write = loop.create_future()
    write.set_exception(ValueError("NOT_FOUND: the folder is gone"))
    del write
    gc.collect()
    loop.close()
    assert not caplog.records


def test_a_path_from_here_is_as_good_as_a_whole_one(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verify(Path("checkpoints/3"))


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (MemoryError(), MemoryError),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"), jax.errors.JaxRuntimeError),
        (RuntimeError("can't start new thread"), CheckpointError),
    ],
)
def test_a_machine_that_cannot_read_a_checkpoint_does_not_call_it_damaged(
    saved, monkeypatch, error, raised
):
    """It would be set aside for an older one, which needs as much."""

    def fail(*_):
        raise Exception(f"Encountered error while reading: {error}") from error  # as orbax does

    monkeypatch.setattr("glamcli.stored_arrays._read", fail)
    with pytest.raises(raised) as caught:
        saved.restore(saved.latest(), state(0))
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    "error", [TypeError("x"), MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x")]
)
def test_an_error_that_is_not_the_disks_is_no_failed_save(saved, monkeypatch, error, background):
    """It would be tried again for half an hour with advice to make room."""

    def fail(*_, **__):
        raise error

    if background:
        saved.save(4, state(4), {})
        monkeypatch.setattr(saved._manager, "wait_until_finished", fail)
    else:
        monkeypatch.setattr("glamcli.checkpoint.digests", fail)
    with pytest.raises(type(error)) as caught:
        saved.wait() if background else saved.save(4, state(4), {})
    assert caught.value is error
    monkeypatch.undo()
    saved.close()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("x")])
def test_an_error_of_the_disk_is_a_failed_save(saved, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(saved._open(), "save", fail)
    with pytest.raises(SaveFailed, match="saving step 4 failed: "):
        saved.save(4, state(4), {})
    monkeypatch.undo()
    saved.close()


def test_an_error_after_the_step_was_complete_is_no_failed_save(saved, monkeypatch):
    saved.save(4, state(4), {})
    finish = saved._manager.wait_until_finished

    def finish_and_fail():
        finish()
        raise OSError("the oldest step could not be deleted")

    monkeypatch.setattr(saved._manager, "wait_until_finished", finish_and_fail)
    assert saved.wait() == 4
    monkeypatch.undo()
    saved.close()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, state(1), {})


def test_params_are_restored_alone_in_any_layout(saved):
    asked = []
    split = NamedSharding(mesh(4), PartitionSpec(None, "data"))
    whole = NamedSharding(mesh(4), PartitionSpec())

    def target(meta):
        asked.append(meta["recipe"])
        return {
            "layers": {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=split)},
            "bias": jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=whole),
        }

    params, meta = restore_params(saved.folder / "2", target)
    assert meta["step"] == 2
    assert asked == [{"seed": 2}]
    assert_same_bits(params, state(2, 1)["params"])
    assert params["layers"]["w"].sharding.shard_shape((16, 8)) == (16, 2)
    assert len(params["bias"].sharding.device_set) == 4


def test_a_step_is_found_by_run_checkpoints_or_step_folder(saved):
    run = saved.folder.parent
    newest = [saved.folder / name for name in "321"]
    assert find_steps(run) == find_steps(saved.folder) == newest
    assert find_steps(saved.folder, 2) == [saved.folder / "2"]
    assert find_steps(saved.folder / "1") == [saved.folder / "1"]


def test_a_missing_step_is_answered_with_the_steps_there_are(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 7") as caught:
        find_step(saved.folder, 7)
    assert caught.value.hint == "has [3, 2, 1]"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_step(tmp_path / "nowhere")


def test_a_step_that_cannot_be_used_is_answered_with_the_reason(saved):
    of_format(1)(saved.folder)
    for path, step in ((saved.folder / "9", None), (saved.folder, 9)):
        with pytest.raises(CheckpointError, match="written by an older version"):
            find_step(path, step)
