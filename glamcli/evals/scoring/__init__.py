"""From prompts to scores.

`choice` and `answer` judge one item with options or free answers; `requests`, `shapes`, `batches`
and `likelihoods` compute log-likelihoods; `text_metrics` compares texts, `task_metrics` sums items
up, `chance` is what guessing scores, `totals` the score of a task and averages of a suite. Not
here: files (`results/`). Called by `evals/run.py` and `evals/harness.py`.
"""
