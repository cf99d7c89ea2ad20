"""A save in a process of its own that dies, or whose disk fails, at one call of the file system.

`python tests/shim.py FOLDER` saves the next step there and leaves as `glam` does; `save` runs it
under shim.c, which strikes at the call asked for.
"""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 60
"""far less than the five minutes for which orbax's threads wait after some failures."""


@dataclass(frozen=True)
class Struck:
    """What became of a save."""

    code: int
    failures: list[str]
    """errors of the first and of the second try, empty for one that worked."""
    calls: list[list[str]]
    """number, call, path and new path of everything that changed files; paths below the folder."""
    seconds: float

    def at(self, number: int) -> str:
        """The call of this number, for a message."""
        return " ".join(next((call for call in self.calls if call[0] == str(number)), ["none"]))


def compiled(folder: Path) -> Path | None:
    """The shim, built there; None without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    built = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(built), str(HERE / "shim.c")]
    subprocess.run([*command, "-ldl"], check=True)
    return built


def save(shim: Path, folder: Path, at: int = 0, mode: str = "kill", error: str = "EIO") -> Struck:
    """Saves the next step in the checkpoint folder `folder`; the call `at` is struck."""
    log, armed = folder.with_name(folder.name + ".log"), folder.with_name(folder.name + ".armed")
    for path in (log, armed):
        path.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "SHIM_DIR": str(folder),
        "SHIM_ARMED": str(armed),
        "SHIM_LOG": str(log),
        "SHIM_AT": str(at),
        "SHIM_MODE": mode,
        "SHIM_ERRNO": str(getattr(errno, error)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    lines = log.read_text().splitlines() if log.exists() else []
    failures = json.loads(ended.stdout.splitlines()[-1]) if ended.stdout else []
    if ended.returncode not in (0, -9):
        raise AssertionError(f"call {at}: {ended.stderr}")
    return Struck(
        ended.returncode,
        failures,
        [line.split("\t") for line in lines],
        time.monotonic() - began,
    )


def state(step: int) -> dict[str, Any]:
    """A small training state of which every word depends on the step."""
    import jax.numpy as jnp
    import numpy as np

    words = np.random.default_rng(step).standard_normal((64, 256), np.float32)
    weights = {"table": jnp.asarray(words), "bias": jnp.asarray(words[0], jnp.bfloat16)}
    return {"params": weights, "opt_state": {"m": jnp.asarray(-words)}, "step": jnp.int32(step)}


def _exact(folder: Path, step: int) -> bool:
    """Whether this step can be restored, with the bits it was saved with.

    Raises: CheckpointError when it cannot be restored.
    """
    import jax
    import numpy as np

    from glamcli.checkpoint import Checkpoints

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = state(step)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), wanted)
    got = Checkpoints(folder).restore(step, target)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def first_steps(folder: Path) -> None:
    """Saves steps 1 and 2."""
    from glamcli.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"run": "shim"})
    checkpoints.close()


def problems(folder: Path, struck: Struck, at: int) -> list[str]:
    """What is wrong with the folder of steps 1 and 2 after a save of step 3 that was struck at the
    call `at`; at the end it was opened again, as by the next start of a run, which saved twice."""
    from glamcli.checkpoint import Checkpoints
    from glamcli.errors import CheckpointError

    found = []
    # A failed save is tried again in the same process; nothing else may complete step 3.
    complete = any(call[3:] == ["/3"] and int(call[0]) != at for call in struck.calls)
    newest = 3 if complete else 2
    checkpoints = Checkpoints(folder, keep=2)
    try:
        if checkpoints.latest() != newest:
            found.append(f"the newest step is {checkpoints.latest()}, not {newest}")
        found += [
            f"step {step} differs" for step in checkpoints.steps() if not _exact(folder, step)
        ]
        for step in (newest + 1, newest + 2):
            checkpoints.save(step, state(step), {"run": "shim"})
        checkpoints.close()
        if not _exact(folder, newest + 2):
            found.append("the next save differs")
    except CheckpointError as error:
        found.append(error.what)
    left = sorted(path.name for path in folder.iterdir())
    if left != sorted(str(newest + k) for k in (1, 2)):
        found.append(f"left: {left}")
    return [f"call {at} ({struck.at(at)}): {each}" for each in found]


def usable(folder: Path) -> int:
    """The newest step that can be restored, which then has the bits it was saved with."""
    from glamcli.checkpoint import Checkpoints
    from glamcli.errors import DamagedCheckpoint

    for step in Checkpoints(folder).steps():
        with contextlib.suppress(DamagedCheckpoint):
            assert _exact(folder, step), step
            return step
    raise AssertionError("no step can be restored")


def unsynced(calls: list[list[str]]) -> set[str]:
    """Files whose content, and folders whose names, a power failure after these calls may lose."""
    dirty: set[str] = set()
    for _, call, path, *target in calls:
        if call == "rename":
            moved = {name for name in dirty if name == path or name.startswith(path + "/")}
            dirty = dirty - moved | {target[0] + name.removeprefix(path) for name in moved}
        if call in ("open", "mkdir", "rename"):
            dirty.add((target or [path])[0].rpartition("/")[0])
        if call in ("write", "truncate", "open"):
            dirty.add(path)
        elif call == "fsync":
            dirty.discard(path)
    return dirty


def _main(folder: Path) -> None:
    from glamcli.checkpoint import Checkpoints
    from glamcli.cli.main import _leave_threads_behind
    from glamcli.errors import CheckpointError

    checkpoints = Checkpoints(folder, keep=2)
    step = (checkpoints.latest() or 0) + 1
    assert _exact(folder, step - 1)
    folder.with_name(folder.name + ".armed").touch()
    failures = []
    for _ in range(2):
        try:
            checkpoints.save(step, state(step), {"run": "shim"})
            checkpoints.wait()
            failures.append("")
            break
        except CheckpointError as error:
            failures.append(error.what)
            time.sleep(0.5)  # a run waits for seconds; orbax's other writes end in that time
    sys.stdout.write(json.dumps(failures) + "\n")
    _leave_threads_behind(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
