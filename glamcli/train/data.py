"""The data of a run, opened by every process of it."""

from __future__ import annotations

from pathlib import Path

from glamcli.config.schema import Recipe
from glamcli.data.cache import writing_cache
from glamcli.data.open import Dataset, cache_dir, open_data
from glamcli.hosts.join import Host
from glamcli.progress import Progress


def open_data_together(recipe: Recipe, progress: Progress, host: Host) -> Dataset:
    """The recipe's data. Where processes share a cache folder, the first one prepares and the
    others wait for it; a process with a folder of its own prepares for itself.

    Raises: what `open_data` raises.
    """
    if host.count == 1:
        return open_data(recipe, progress)
    cache = cache_dir(recipe)
    waits = _shares(cache, host) and not host.is_first
    if waits:
        progress.say(f"waiting for process 0, which prepares the data in {cache}")
        host.wait("data")
    dataset = open_data(recipe, progress)
    if not waits:
        with progress.phase("waiting for the data of the other processes"):
            host.wait("data")
    return dataset


def _shares(cache: Path, host: Host) -> bool:
    with writing_cache(cache):
        return host.shares(cache)[host.index]
