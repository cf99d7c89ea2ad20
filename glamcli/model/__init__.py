"""The model: parameters, layers, routing, dispatch and the decoder, for any mesh.

Not here: devices and axes (`parallel/`), the loss and the optimizer (`train/`), text
(`generate.py`, `evals/`). Called by those three.

Letters of array axes, in the whole package:

    B rows of a batch            M model width                 L layers, or blocks of layers
    S tokens of a row or group   H feed-forward width          P pipeline stages
    T key positions              N attention heads             U microbatches
    G groups of tokens           D width of a head             I repeats of a circular pipeline
    E experts                    V vocabulary                  R position buckets
    C slots per expert, group    F tokens of all groups        O continuations of one context
    K experts per token          Q rows of the experts' queue  Y scored targets
    J candidates for a token     W beam width                  X parts of a batch or a row
    A accumulated parts          Z copies of a stage's weights

`x_BSM` is an array [B, S, M]. A digit is a size.
"""
