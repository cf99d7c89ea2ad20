"""What a recipe needs and costs on devices that are not here: bytes, seconds, money.

`planner.make_plan` compiles the step of `train/programs.py` for a described target and reads its
memory, collectives and schedule; `search` ranks layouts, by arithmetic first; `words` and `page`
put a plan into text. Facts about chips are in `config/chips.toml`. Called by `cli/plan.py` and the
benchmarks; tests of layouts use `hlo` and `collectives`.
"""
