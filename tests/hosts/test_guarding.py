"""Numbers that go wrong in one process alone make all of them go back."""

import json

import pytest

from glamcli.checkpoint import Checkpoints
from glamcli.train.rewind import rewinds
from runs import SMALL, finished, metrics

# In process `BAD`, the loss of a row is no number in the batches `WHICH`, counted from 0 over all
# attempts of the run.
POISON = """
import itertools, json, os
import jax.numpy as jnp
from glamcli.model.decoder import Decoder
from glamcli.train import loop, programs
class Poisoned(Decoder):
    def losses(self, params, x_BSM, targets_BS):
        nats_BS, logz_BS = super().losses(params, x_BSM, targets_BS)
        return nats_BS * jnp.where(targets_BS == 259, jnp.nan, 1.0), logz_BS
programs.Decoder = Poisoned
count, put = itertools.count(), loop.global_batch
def poisoned(batch, here, layout):
    if next(count) in json.loads(os.environ["WHICH"]):
        batch["targets"][0, :] = 259
    return put(batch, here, layout)
loop.global_batch = poisoned
"""


def poisoned(*which):
    return {"first": POISON, "WHICH": lambda k: json.dumps(which if k == 1 else ())}


@pytest.mark.slow
def test_two_processes_go_back_together(several, tmp_path):
    sets = ("train.steps=20", "train.max_bad_steps=2", "every.checkpoint_steps=3")
    sets += ("guard.on_spike=rewind", "guard.rewind_skip_batches=4", "every.log_steps=1")
    arguments = [part for each in sets for part in ("--set", each)]
    two = several(tmp_path / "run", *SMALL, *arguments, **poisoned(7, 8))
    finished(two)
    assert "going back to step 6, and on without batches 7 to 13" in two[0].rest
    (record,) = rewinds(tmp_path / "run")
    assert (record.to_step, record.skip_batches) == (6, 7)
    steps = [line["step"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert steps == [*range(1, 7), *range(14, 21)]
    assert Checkpoints(tmp_path / "run/checkpoints").meta(20)["skipped_batches"] == [[6, 13]]
