"""The analyses of the paper: training text that holds test items, and bias.

`overlap` (with `ngrams` and `corpus`) finds items in the training text; `cooccurrence` and
`toxicity` look at sampled `continuations`. Called by `glam eval overlap`, `cooccurrence`,
`toxicity`; they need no suite run.
"""
