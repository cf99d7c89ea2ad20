"""What a run is to do: recipes and mixtures, from YAML to frozen settings or every mistake.

`load` is the entry. `schema`, `devices` and `mixtures` hold the settings, `check` the rules between
them, `sizes`, `sharding` and `stages` what follows from them by arithmetic. No jax is imported, no
file is read but YAML. Everything calls this; it calls only `errors`.
"""
