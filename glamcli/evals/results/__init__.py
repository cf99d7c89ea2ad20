"""Scores as values and as files.

`scores` what a result holds, `store` RUN/eval/NAME.json, `journal` what an unfinished evaluation
has scored, `compare` two results item by item. Not here: computing scores (`scoring/`) and tables
of them (`cli/`).
"""
