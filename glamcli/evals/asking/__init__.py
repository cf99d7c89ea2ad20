"""From items to the texts a model sees: questions, demonstrations, prompts.

`question` turns one item into contexts, options and accepted answers; `prompts` draws and trims
demonstrations. Not here: tokens (`scoring/requests.py`). Called by `evals/run.py` and `paper/`.
"""
