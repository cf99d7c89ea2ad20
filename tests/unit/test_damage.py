"""Damaged checkpoints: whatever happened to a file, its step is restored as it was saved, or not at
all, and then the error names the file or the array."""

import errno
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.errors import CheckpointError, DamagedCheckpoint, SaveFailed
from glamcli.hosts.join import ALONE, Host
from glamcli.model.digest import digests
from glamcli.named_leaves import named_leaves
from glamcli.restore import restore_params
from glamcli.step_folders import CHECKPOINT_FORMAT, find_steps, newest_first
from glamcli.stored_arrays import newest_usable, verify
from glamcli.train.folder import newest
from unit.test_checkpoint import abstract, assert_same_bits, put, rewrite_meta

GOLDEN = Path(__file__).parents[1] / "golden"
FLIPS = 200
SMALL_SHARE = 8  # of the flips, in the default suite
META = {"recipe": {"model": {"zero_logit": True, "norm_epsilon": 1e-6}, "seed": 17}}


def state(step: int, num_devices: int = 1):
    """Arrays large enough to be files of their own and not part of orbax's index."""
    rng = np.random.default_rng(step)
    w = rng.standard_normal((32, 64), np.float32)
    return {
        "params": {
            "w": put(w, num_devices, "data"),
            "bias": put(jnp.asarray(rng.standard_normal(512), jnp.bfloat16), num_devices),
        },
        "opt_state": {"v": put(w * w, num_devices), "count": put(np.int32(step), num_devices)},
    }


TARGET = abstract(state(1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder that holds steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("whole") / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step), META)
    checkpoints.close()
    return checkpoints.folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "checkpoints")


def restored(folder: Path, step: int = 2):
    return Checkpoints(folder).restore(step, TARGET)


def refusal(folder: Path) -> str | None:
    """Why step 2 is refused; None when it is restored, and then as it was saved."""
    try:
        tree = restored(folder)
    except DamagedCheckpoint as error:
        return error.what.split("cannot be used: ")[1]
    assert_same_bits(tree, state(2))
    return None


def files(folder: Path, *patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    assert found
    return sorted(path for path in found if path.is_file())


def flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    position, bit = rng.randrange(len(data)), rng.randrange(8)
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {position} of {path}"


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_digests_are_those_of_any_other_mesh(tmp_path, num_devices):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1, num_devices), META)
    checkpoints.close()
    assert checkpoints.meta(1)["digests"] == DIGESTS
    for other in (1, 4, 8):
        assert_same_bits(checkpoints.restore(1, abstract(state(1, other))), state(1))


DIGESTS = digests(named_leaves(state(1)))


@pytest.mark.parametrize(
    ("first", "end"),
    [(0, FLIPS // SMALL_SHARE), pytest.param(FLIPS // SMALL_SHARE, FLIPS, marks=pytest.mark.slow)],
)
def test_no_flipped_bit_of_arrays_or_descriptions_is_used(whole, tmp_path, first, end):
    """In files of values, of weights and optimizer state alike, and in what describes them."""
    values = files(whole, "2/state/ocdbt.process_0/d/*")
    others = files(whole, "2/meta/metadata", "2/state/_METADATA", "2/state/array_metadatas/*")
    others += files(whole, "2/state/d/*", "2/state/manifest.ocdbt")
    refused = dict.fromkeys(("values", "others"), 0)
    for seed in range(first, end):
        folder = shutil.copytree(whole, tmp_path / str(seed))
        rng = random.Random(seed)
        kind, paths = rng.choice([("values", values), ("others", others)])
        where = flip(folder / rng.choice(paths).relative_to(whole), rng)
        said = refusal(folder)  # none if the bit is no part of any array
        refused[kind] += said is not None
        assert said is None or re.search("`params|`opt_state|state/|meta/|description", said), where
        shutil.rmtree(folder)
    assert all(refused.values())


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [half, emptied, zeroed, Path.unlink])
def test_every_damaged_file_is_harmless_or_named_and_the_older_step_is_taken(
    whole, tmp_path, damage
):
    is_refused = {}
    for path in files(whole, "2/**/*"):
        name = str(path.relative_to(whole / "2"))
        folder = shutil.copytree(whole, tmp_path / name.replace("/", "_"))
        damage(folder / "2" / name)
        said: list[str] = []
        tree = newest_usable(
            lambda folder=folder: newest_first(folder),
            lambda path, meta: restored(path.parent, int(path.name)),
            ALONE,
            said.append,
        )
        is_refused[name] = bool(said)
        assert_same_bits(tree, state(1) if said else state(2))
        if said:
            assert f"{folder}/2 cannot be used: " in said[0]
            assert name in said[0] or "`" in said[0] or "the state is missing" in said[0]
            assert "<" not in said[0]
            assert said[1] == "going back to step 1: up to 1 steps of training are lost"
    assert is_refused["meta/metadata"]
    assert is_refused["state/manifest.ocdbt"]
    assert not is_refused["_CHECKPOINT_METADATA"]
    assert not is_refused["state/_sharding"]
    assert not is_refused["state/array_metadatas/process_0"]


def edited(key: str, value: object) -> Callable[[str], str]:
    def edit(text: str) -> str:
        meta = json.loads(text)
        meta["recipe"]["model"][key] = value
        return json.dumps(meta)

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (edited("zero_logit", False), "not as saved"),
        (edited("norm_epsilon", 1e-5), "not as saved"),
        (lambda text: text.replace('"checksum"', '"checksun"'), "not as saved"),
        (lambda text: text.replace('"format": 4', '"format": 5'), "not as saved"),
        (lambda text: text.replace('"tree"', '"tre"'), "not as saved"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: text[:-5], "cannot be read"),
        (lambda text: "[]", "cannot be read"),
    ],
)
def test_an_edited_description_is_refused(folder, edit, reason):
    path = folder / "2" / "meta" / "metadata"
    before = path.read_text()
    path.write_text(edit(before))
    assert path.read_text() != before
    with pytest.raises(DamagedCheckpoint, match=reason):
        restored(folder)
    assert Checkpoints(folder).latest() == 1


def test_whitespace_in_a_description_is_no_damage(folder):
    path = folder / "2" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    assert_same_bits(restored(folder), state(2))


def test_names_that_the_arrays_do_not_have_are_refused(folder):
    path = folder / "2" / "state" / "_METADATA"
    path.write_text(path.read_text().replace("bias", "bins"))
    with pytest.raises(DamagedCheckpoint, match="state/_METADATA does not have `params/bias`"):
        restored(folder)


@pytest.mark.parametrize("num_restores", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_whole_steps_raise_no_alarm(whole, num_restores):
    for _ in range(num_restores):
        assert_same_bits(restored(whole), state(2))


def test_verify_reads_every_array(folder):
    verify(folder / "2")
    path = max(files(folder, "2/state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    half(path)
    with pytest.raises(DamagedCheckpoint):
        verify(folder / "2")


def test_a_step_that_is_deleted_while_it_is_read_is_left_out_without_a_word(folder):
    said: list[str] = []

    def read(step: Path, meta):
        if step.name == "2":
            step.rename(folder / "deleted")  # as retention does
        return restored(step.parent, int(step.name))

    assert_same_bits(
        newest_usable(lambda: newest_first(folder), read, ALONE, said.append), state(1)
    )
    assert said == []


def test_a_failure_in_another_process_is_one_in_this(folder):
    """Process 1 alone cannot read its parts; both take the older step."""

    class Other(Host):
        def gather(self, name, value):
            theirs = "state/d/x is damaged" if name == "arrays" and not said else value
            return [value, theirs]

    said: list[str] = []
    tree = newest_usable(
        lambda: newest_first(folder),
        lambda step, meta: Checkpoints(folder, host=Other(count=2)).restore(int(step.name), TARGET),
        Other(count=2),
        said.append,
    )
    assert_same_bits(tree, state(1))
    assert "state/d/x is damaged" in said[0]


def save_all(folder: Path, keep: int, steps: dict[int, bool]) -> list[int]:
    checkpoints = Checkpoints(folder, keep)
    for step, good in steps.items():
        checkpoints.save(step, state(step), {"good": good})
    checkpoints.close()
    return checkpoints.steps()


def test_two_good_steps_stay_and_the_newest(tmp_path):
    good, bad = True, False
    assert save_all(tmp_path / "a", 1, {1: good, 2: good, 3: good}) == [3, 2]
    assert save_all(tmp_path / "b", 2, {1: good, 2: good, 3: bad, 4: bad}) == [4, 2, 1]
    assert save_all(tmp_path / "c", 2, {1: good, 2: bad, 3: good, 4: good}) == [4, 3]
    assert not (tmp_path / "c" / "trash").exists()


DISK_FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("Error writing [os_error_code='28'] [source locations='file_io.cc:9']"),
)


@pytest.mark.parametrize("error", DISK_FULL)
def test_a_full_disk_costs_a_step_per_attempt_and_never_the_two_last_good_ones(
    tmp_path, monkeypatch, error
):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step, good in {1: True, 2: True, 3: True, 4: False}.items():
        checkpoints.save(step, state(step), {"good": good})
    checkpoints.wait()

    def hint_of(error: Exception) -> str | None:
        def fail(*_, **__):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._open(), "save", fail)
            with pytest.raises(SaveFailed) as caught:
                checkpoints.save(5, state(5), {})
        return caught.value.hint

    assert hint_of(OSError(errno.EIO, "Input/output error")) == "step 4 is complete"
    assert checkpoints.steps() == [4, 3, 2, 1]
    assert hint_of(error) == "step 4 is complete, step 1 was deleted to make room"
    assert checkpoints.steps() == [4, 3, 2]
    assert hint_of(error) == "step 4 is complete"
    assert checkpoints.steps() == [4, 3, 2]
    checkpoints.save(5, state(5), {})
    checkpoints.close()
    assert checkpoints.steps() == [5, 3, 2]


def test_a_damaged_step_does_not_count_as_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state(step), {})
    checkpoints.wait()
    emptied(tmp_path / "2" / "meta" / "metadata")
    checkpoints.save(3, state(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [3, 1]


@pytest.mark.parametrize(
    ("dtype", "shape"), [("bfloat16", (32, 64)), ("int32", (32, 64)), ("float32", (10**6, 10**6))]
)
def test_another_dtype_or_shape_is_refused_before_anything_is_allocated(folder, dtype, shape):
    target = {**TARGET, "params": {**TARGET["params"]}}
    like = TARGET["params"]["w"]
    target["params"]["w"] = jax.ShapeDtypeStruct(shape, dtype, sharding=like.sharding)
    shutil.rmtree(folder / "2" / "state" / "d")
    with pytest.raises(CheckpointError, match="1 arrays differ") as caught:
        Checkpoints(folder).restore(2, target)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_an_absurd_shape_in_a_description_is_refused_before_anything_is_allocated(folder):
    rewrite_meta(folder / "2", tree={"params/w": ["float32", [10**12, 10**6]]})
    with pytest.raises(CheckpointError, match=r"float32\[1000000000000, 1000000\]"):
        restore_params(folder / "2", lambda meta: {"w": TARGET["params"]["w"]})


@pytest.mark.parametrize("version", [3, 4])
def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, version):
    """Of `state(7)` in four parts, saved before digests, and when they were new: whatever changes,
    the digests of saved checkpoints stay what they are."""
    folder = shutil.copytree(GOLDEN / f"checkpoint_of_format_{version}", tmp_path / "checkpoints")
    assert Checkpoints(folder).meta(7)["format"] == version
    assert_same_bits(restored(folder, 7), state(7))
    verify(folder / "7")


def test_a_step_of_a_newer_version_is_no_damage(folder):
    """An older one in its place would be trained again, by a version that has been replaced."""
    rewrite_meta(folder / "2", format=CHECKPOINT_FORMAT + 1, tree="of another kind")
    use: list[Callable[[], object]] = [
        lambda: newest_usable(lambda: newest_first(folder), lambda step, _: step, ALONE, print),
        lambda: newest(Checkpoints(folder), ALONE),
        lambda: restored(folder),
        lambda: verify(folder / "2"),
    ]
    for each in use:
        with pytest.raises(CheckpointError, match="2 cannot be used: written by a newer") as caught:
            each()
        assert not isinstance(caught.value, DamagedCheckpoint)
    (folder / "2").rename(folder / "0")
    rewrite_meta(folder / "0", step=0)
    assert newest(Checkpoints(folder), ALONE)[0] == 1  # nothing of it is replaced


def test_a_description_that_one_process_cannot_read_is_damage_in_all(folder):
    class First(Host):
        def gather(self, name, value):
            torn = name == "description" and value["step"] == 2
            return [value, "torn" if torn else value]

    said: list[str] = []
    read = newest_usable(
        lambda: newest_first(folder), lambda step, _: step, First(count=2), said.append
    )
    assert read == folder / "1"
    assert said[0] == f"checkpoint {folder}/2 cannot be used: torn"


def test_all_processes_go_by_the_description_that_the_first_has_read(folder):
    class Second(Host):
        def gather(self, name, value):
            assert name in ("checkpoints", "description")
            return [[str(folder / "2")] if name == "checkpoints" else theirs, value]

    theirs = {"step": 2, "of": "the first"}
    read = newest_usable(list, lambda *found: found, Second(index=1, count=2), print)
    assert read == (folder / "2", theirs)


@pytest.mark.parametrize("name", ["iterdir", "is_symlink"])
def test_a_folder_without_permission_is_named(folder, monkeypatch, name):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, name, refused)
    read = (lambda: find_steps(folder), lambda: newest(Checkpoints(folder), ALONE))
    for each in read:
        with pytest.raises(CheckpointError, match=f"^{folder}.*cannot be read") as caught:
            each()
        assert caught.value.exit_code == 4


def test_a_step_number_that_is_none_is_named(folder):
    rewrite_meta(folder / "2", step=float("inf"))
    said: list[str] = []
    newest_usable(lambda: newest_first(folder), lambda step, _: step, ALONE, said.append)
    assert said == [
        f"checkpoint {folder}/2 cannot be used: it holds step inf",
        "going back to step 1: up to 1 steps of training are lost",
    ]


@pytest.mark.parametrize(
    ("source", "lost"),
    [(None, "nothing is"), ("1", "nothing is"), ("2", "up to 1 steps of training are")],
)
def test_a_stray_folder_counts_for_the_step_that_it_holds(folder, source, lost):
    """An empty folder 999, and copies of steps under that name, lose no 997 steps."""
    if source:
        shutil.copytree(folder / source, folder / "999")
        shutil.rmtree(folder / "2")
    else:
        (folder / "999").mkdir()
    said: list[str] = []
    read = newest_usable(lambda: newest_first(folder), lambda step, _: step, ALONE, said.append)
    assert f"{folder}/999 cannot be used" in said[0]
    assert said[1] == f"going back to step {read.name}: {lost} lost"
