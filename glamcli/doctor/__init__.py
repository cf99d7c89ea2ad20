"""What this machine offers to a run, and whether every mesh computes the same on it.

Here: facts about the machine (`machine`), and one training step on one device compared with every
kind of mesh (`parity`). Not here: how either is shown, which is `cli/doctor.py`, the only caller
besides the tests.
"""
