"""A launch as a job of Slurm, on machines with GPUs or without, which share a file system."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from glamcli.launch.decisions import FINAL_CODES, MAX_ENDS
from glamcli.launch.record import Launch


@dataclass(frozen=True)
class Nodes:
    """What a job of Slurm asks for: machines, and the GPUs of each; 0 for CPUs alone."""

    number: int
    gpus: int

    @property
    def num_devices(self) -> int:
        """One process for each: per GPU, or per machine."""
        return self.number * max(self.gpus, 1)

    @property
    def extras(self) -> tuple[str, ...]:
        """Of glam's package."""
        return ("gpu",) * (self.gpus > 0)


_JOB = """\
#!/bin/bash
# A job of Slurm. From any folder:   sbatch {file}
# This folder and the run's must be on a file system that all nodes share.
#SBATCH --job-name={name}
#SBATCH --output={log}
#SBATCH --open-mode=append          # of all starts
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}         # {why}
{gpus}#SBATCH --exclusive                 # no other job on these nodes
#SBATCH --time=24:00:00             # as your partition allows; a longer run is queued again
#SBATCH --signal=TERM@300           # that long before the end: all save and end with 75
#SBATCH --requeue                   # also after a node failed, or another job went first
# Add what your cluster asks for: --partition, --account, --qos.
set -uo pipefail
package={package}
run={run}

newest() {{ ls "$run/checkpoints" 2> /dev/null | grep -E '^[0-9]+$' | sort -n | tail -1; }}

# Once, on one node: an environment with glam as it was when this file was written. It needs PyPI.
if [ ! -e "$package/installed" ]; then
    srun --nodes=1 --ntasks=1 python3 "$package/worker.py" install || exit
fi

without=0       # ends in a row without a new checkpoint
while :; do
    before=$(newest)
    # On every node, where processes find each other by Slurm's variables:
    #     glam train recipe.yaml --run {run}
    # Nothing is killed for the end of one process: the others say why they end, and then do.
    srun --kill-on-bad-exit=0 --wait=0 python3 "$package/worker.py" run
    code=$?
    case $code in
        0) exit 0 ;;
        {final}) exit $code ;;          # the same the next time (docs/hosts.md)
        75) scontrol requeue "$SLURM_JOB_ID"; exit $code ;;         # all is saved; its time is up
    esac
    if [ "$(newest)" = "$before" ]; then without=$((without + 1)); else without=0; fi
    [ $without -lt {ends} ] || exit $code
    sleep 30
done
"""
_GPUS = "#SBATCH --gpus-per-node={}\n"


def job(launch: Launch, folder: Path, nodes: Nodes) -> str:
    """The job, for `sbatch`; `folder` is where it stands, beside the folder `package`."""
    return _JOB.format(
        name=launch.name,
        file=shlex.quote(str(folder / "job.sbatch")),
        log=shlex.quote(str(folder / "job.log")),
        package=shlex.quote(str(folder / "package")),
        run=shlex.quote(launch.run),
        nodes=nodes.number,
        tasks=max(nodes.gpus, 1),
        gpus=_GPUS.format(nodes.gpus) * (nodes.gpus > 0),
        why="a process has one GPU" if nodes.gpus else "a process has all cores",
        final=" | ".join(map(str, sorted(FINAL_CODES))),
        ends=MAX_ENDS,
    )
