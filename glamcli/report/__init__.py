"""Runs as one HTML page: what they learned, what their routers did, where their time went.

`curves` thins the numbers of a metrics file, `events` finds what happened, `mixture` and `scores`
what was read and reached; `run` puts them together from a run folder. `charts` says what is drawn,
`sections` what is written around it, `page` makes the file. Called by `glam report` only; it starts
no jax program and changes nothing in a run folder.
"""
