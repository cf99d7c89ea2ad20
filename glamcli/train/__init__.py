"""Training: a run from its recipe to its last checkpoint, with everything that it writes.

`loop` is the entry and reads from top to bottom; `events` is what happens between steps; `step` is
the program that every step runs, `programs` compiles it, `state` and `optimizer` are what it
updates. Not here: the model (`model/`), several processes (`hosts/`), what a finished model can do
(`trained.py`, `evals/`). Called by `glam train` and `glamcli.train`; the planner compiles the same
programs.
"""
