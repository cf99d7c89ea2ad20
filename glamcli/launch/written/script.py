"""A launch as a shell script, for whoever wants to read or change what is done."""

import shlex

from glamcli.launch.gcloud import create_words, place_words
from glamcli.launch.record import Launch
from glamcli.launch.workers import HOME_FOLDER

_SCRIPT = """#!/bin/bash
# Asks for a slice, installs the glam in ./package on its machines, and starts on all of them
#     glam train recipe.yaml --run {run}
# Nobody looks after it then: nothing is started again, and the slice costs money until
#     {delete}
set -euo pipefail
cd "$(dirname "$0")"
place=({place})

{create}
state=
until [ "$state" = ACTIVE ]; do
    state=$(gcloud compute tpus queued-resources describe {name} "${{place[@]}}" \\
        --format='value(state.state)')
    case $state in FAILED | SUSPEND*) echo "the request is $state" >&2; exit 1 ;; esac
    [ "$state" = ACTIVE ] || sleep 30
done

on_all() {{ gcloud compute tpus tpu-vm ssh {name} "${{place[@]}}" --worker=all --command="$1"; }}
on_all 'rm -rf {folder} && mkdir -p {home}'
gcloud compute tpus tpu-vm scp package {name}:{folder} "${{place[@]}}" --recurse --worker=all
on_all 'python3 {folder}/worker.py install'
on_all 'python3 {folder}/worker.py start 1'

# How it is, with the end of the log (-1), as one line of JSON per machine:
on_all 'python3 {folder}/worker.py status -1'
"""


def script(launch: Launch) -> str:
    """The script, for bash; it stands beside the folder `package`."""
    place = shlex.join(place_words(launch.zone, launch.project))
    gcloud = "gcloud compute tpus"
    return _SCRIPT.format(
        name=launch.name,
        run=shlex.quote(launch.run),
        place=place,
        home=HOME_FOLDER,
        folder=f"{HOME_FOLDER}/{launch.name}",
        create=f'{gcloud} {shlex.join(create_words(launch))} "${{place[@]}}"',
        delete=f"{gcloud} queued-resources delete {launch.name} {place} --force",
    )
