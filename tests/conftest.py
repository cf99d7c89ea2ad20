"""Test-wide settings: eight simulated devices, and silent dtype promotion is an error."""

import os
import signal
from pathlib import Path

from hypothesis import settings

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compiling small programs that run once. They are kept for the next
# test, process and run of the suite that needs them; a program that changed is another entry.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
compiled = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# Programs that tests start are sent these, and would inherit from `nohup pytest` and from
# `pytest &` of a script that they are ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A law holds on a busy machine as well.
settings.register_profile("laws", deadline=None)
settings.load_profile("laws")

# The command line, runs of `glam train` in their own processes, and buckets, for every test.
pytest_plugins = ("command", "runs", "bucket")
