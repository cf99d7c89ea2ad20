"""Where arrays live: meshes of devices, the sharding table applied to arrays, pipeline stages.

Which axes arrays have, and what does not divide, is in `config/sharding.py`, which needs no jax;
how processes find and end each other is in `hosts/`. Called by the model, training and planning.
"""
