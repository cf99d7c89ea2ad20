"""Task and suite files, and the items they name.

`schema` the keys, `suites` the files, `items` what is read, `template` the texts with holes,
`quick` questions from held-out documents, `provision` and `convert` how data gets there. Not here:
the text a model sees (`asking/`). Called by all of evaluation and by `glam eval data`.
"""
