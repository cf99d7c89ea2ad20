"""The command line: one file per command, each of which reads arguments, calls and shows.

Here: `main` (the table of commands, and every way of ending), `render` (the only user of rich),
`options` and `several` (what commands share). Not here: anything that a Python program would need,
which is in the packages below. Called by the `glam` entry point, and `harness` by lm-eval as well.
"""
