"""From the sources of a mixture to batches: reading, tokenizers, prepared rows and their order.

`open.py` opens all of it for a recipe; programs, evaluation and the command line start there.
Here as well: the cache folder (`cache.py`), also of what others keep in it, and TFDS folders
(`examples.py`). Not here: mixture files and their rules (`config/mixtures.py`), arrays on devices
(`parallel/`), and evaluation tasks (`evals/tasks/`).
"""
