"""A launch as a task of SkyPilot, which then rents the slice, and another one when it is lost."""

from glamcli.errors import EXIT_PREEMPTED
from glamcli.launch.record import Launch
from glamcli.launch.workers import HOME_FOLDER

# Ends that may pass: a signal (128 + n) may be that of a machine which was taken away.
_AGAIN_CODES = (EXIT_PREEMPTED, 86, *(128 + n for n in (1, 2, 6, 7, 9, 11, 15)))

_TASK = """\
# A managed job of SkyPilot: it rents the slice, runs the two commands below on all of its machines,
# and rents another slice when this one is taken away. From the folder of this file:
#     sky jobs launch task.yaml       sky jobs queue, sky jobs logs, sky jobs cancel
# The run's folder has to be the same on every machine: what was given as `--setup` mounts it, and
# the installation below runs that first.
name: {name}

resources:
  infra: gcp/{region}/{zone}
  accelerators: tpu-{accelerator}:1
  accelerator_args:
    runtime_version: {image}        # glam brings its own jax: no image that has one
  use_spot: {spot}
  job_recovery:
    # Ends that may pass start the same command again, which continues from the newest checkpoint:
    # asked to stop, no progress, another machine gone (docs/hosts.md). SkyPilot does not count
    # them. All others end the job: they would be the same the next time.
    max_restarts_on_errors: 0
    recover_on_exit_codes: [{again}]

file_mounts:
  ~/{home}: ./package               # glam as it is here, its versions, the recipe, a secret

setup: |
  python3 ~/{home}/worker.py install

# The same on every machine, which on a TPU slice find each other by themselves:
#     glam train recipe.yaml --run {run}
run: |
  python3 ~/{home}/worker.py run
"""


def task(launch: Launch) -> str:
    """The task, in YAML; it stands beside the folder `package`."""
    return _TASK.format(
        name=launch.name,
        run=launch.run,
        zone=launch.zone,
        region=launch.zone.rpartition("-")[0],
        accelerator=launch.accelerator,
        image=launch.image,
        spot=str(launch.spot).lower(),
        again=", ".join(map(str, _AGAIN_CODES)),
        home=HOME_FOLDER,
    )
