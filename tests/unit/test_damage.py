"""Damaged checkpoints: whatever happened to a file, its step is restored as it was saved, or not at
all, and then the error names the file or the array."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from glamcli.checkpoint import Checkpoints, verify
from glamcli.errors import DamagedCheckpoint
from glamcli.hosts.join import ALONE
from glamcli.model.digest import digests
from glamcli.named_leaves import named_leaves
from glamcli.step_folders import newest_first
from glamcli.stored_arrays import newest_usable
from unit.test_checkpoint import abstract, assert_same_bits, put

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
            lambda path: restored(path.parent, int(path.name)),
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
        (lambda text: text.replace('"tree"', '"tre"'), "cannot be read"),
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
