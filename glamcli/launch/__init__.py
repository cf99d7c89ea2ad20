"""Runs on rented TPU slices: asked for, installed, started, watched, started again and given back.

`control.py` is the loop, `decisions.py` what it decides by (without side effects), `gcloud.py` the
only caller of Google's command, `worker.py` what runs on the machines of a slice (the standard
library of an old Python only), `package.py` what they are sent, `record.py` what is kept here.
Nothing here trains: the machines run `glam train`. Called by `glamcli.cli.launch`.
"""
