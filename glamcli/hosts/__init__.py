"""How the processes of a run find, hear and end each other, and how one process ends.

`join` is the entry: it makes a `Host`, which everything else sees. `rendezvous`, `greeting` (with
`door` and `secret`) and `wire` connect; `pulse` and `pace` exchange a few numbers per step;
`watchdog`, `signals` and `lock` also serve a run of one process. Where arrays live is in
`parallel/`. Called by `cli/several.py` and `train/`.
"""
