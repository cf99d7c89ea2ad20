"""A run whose memory the operating system limits ends with words, and keeps what it saved."""

import pytest

from glamcli.stored_arrays import verify
from glamcli.train.beginning import STATE_HINT
from runs import SMALL

# Two arrays of 122 MiB each are its state, and a step takes more than 200 MiB beside them.
LARGE = (
    *(*SMALL, "--set", "model.vocab_size=500000", "--set", "model.model_dim=64"),
    *("--set", "batch.rows=1", "--set", "train.steps=3", "--set", "every.checkpoint_steps=1"),
)
# From then on 100 MiB more than the process has, which is enough for the stacks of threads.
LIMIT = """
import resource, sys, time
from pathlib import Path
import jax
from glamcli import checkpoint, restore
from glamcli.train.corruption import Checked
def limit():
    with open("/proc/self/status") as status:
        has = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
    most = (has << 10) + (100 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
"""
IN_A_STEP = f"""{LIMIT}
step = Checked.__call__
def limited(self, number, state, batch):
    if number == 3:
        saved = checkpoint.Checkpoints(Path(sys.argv[sys.argv.index("--run") + 1], "checkpoints"))
        while saved.latest() != 2:
            time.sleep(0.02)  # a save without memory aborts the process
        jax.block_until_ready(state)  # the memory of the step before would do for this one
        limit()
    return step(self, number, state, batch)
Checked.__call__ = limited
"""
IN_A_RESTORE = f"""{LIMIT}
read = restore.read_arrays
def limited(*arguments):
    limit()
    return read(*arguments)
restore.read_arrays = limited
"""


@pytest.mark.slow
def test_without_memory_a_run_says_what_to_change_and_keeps_its_checkpoints(train, tmp_path):
    def ended(first: str) -> tuple[int, str]:
        code, err = train(tmp_path / "run", *LARGE, first=first).finish()
        assert "Traceback" not in err
        assert "damaged" not in err
        return code, err

    code, err = ended(IN_A_STEP)
    assert code == 5, err
    assert "error: out of device memory: Out of memory allocating" in err
    assert "hint: lower `batch.row_tokens`, raise `batch.accumulate`" in err
    assert "step 2 is complete and goes on from there" in err
    verify(tmp_path / "run/checkpoints/2")

    code, err = ended(IN_A_RESTORE)
    assert code == 5, err
    assert "error: out of memory: Unable to allocate" in err
    assert f"hint: {STATE_HINT}" in err

    run = train(tmp_path / "run", *LARGE)
    run.until("say", text="continuing from step 2")
    assert run.finish()[0] == 0
