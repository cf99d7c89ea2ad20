"""Evaluation: tasks, how they are asked and scored, results, and the analyses of the paper.

`tasks/` reads task files and their items, `asking/` makes prompts of items, `scoring/` has a model
judge or answer them and computes metrics, `results/` keeps and compares scores, `paper/` holds the
overlap, co-occurrence and toxicity analyses. `run.py` joins them, `scheduled.py` is for training,
`harness.py` for lm-eval. Not here: models (`trained.py`) and tables (`cli/`), which call it.
"""
