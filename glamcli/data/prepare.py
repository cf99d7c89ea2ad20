"""Sources to rows, once: tokenise, pack, write to the cache under a fingerprint.

The fingerprint covers the source's settings, the content of its files, tokenizer, packing and row
length. A folder appears whole or not at all: it is built beside its final path, part by part
(`parts.py`) and under a lock, and finished parts survive an interruption. How rows are stored is
`rows.py`.
"""

import contextlib
import functools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from glamcli import atomic
from glamcli.config.mixtures import Mixture, Source
from glamcli.config.schema import Recipe
from glamcli.data.cache import cache_path, json_digest, shared_cache
from glamcli.data.parts import (
    SPLITS,
    cut,
    finished_part,
    join_parts,
    make_part,
    part_chars,
)
from glamcli.data.prepared import Prepared
from glamcli.data.rows import META_FILE, Rows, read_rows_meta
from glamcli.data.shared import copy_entry, share_entry
from glamcli.data.sources import READ_SETTINGS, Reading, documents, source_inputs
from glamcli.data.split import Sides, divide_mixture
from glamcli.data.tokenizer import Tokenizer
from glamcli.data.workers import Workers
from glamcli.errors import DataError
from glamcli.hosts.lock import hold
from glamcli.progress import Progress
from glamcli.storage import Remote
from glamcli.untrusted import parse_as, read_file

# Part of every fingerprint: raise it when the same inputs would give other rows.
ROWS_FORMAT = 3
# Warned of when so much more of a source is held out than twice what the mixture asks for.
MAX_HELDOUT_SHARE = 0.05
# Less than this is prepared before other processes would have started.
WORTH_PROCESSES_BYTES = 4 << 20
MEMORY_HINT = "run again: finished parts are kept; fewer `data.prepare_processes` need less memory"


@dataclass(frozen=True)
class _Plan:
    """A source, and the folder its rows belong in."""

    name: str
    source: Source
    inputs: dict[str, Any]
    folder: Path
    num_bytes: int


def prepare(
    recipe: Recipe, mixture: Mixture, tokenizer: Tokenizer, cache: Path, progress: Progress
) -> Prepared:
    """Rows of every source of the mixture, prepared now unless they are in the cache.

    Raises: DataError for a source that cannot be read, and for a damaged prepared folder.
    """
    sides = divide_mixture(mixture, cache, progress)
    plans = _plans(recipe, mixture, tokenizer, sides, cache)
    _warn_of_copies(plans, progress)
    note, last = last_rows(recipe, mixture, cache)
    missing = [plan for plan in plans if not (plan.folder / META_FILE).exists()]
    small = sum(plan.num_bytes for plan in missing) < WORTH_PROCESSES_BYTES
    processes = 1 if small else recipe.data.prepare_processes
    shared = shared_cache(recipe)
    make = functools.partial(make_part, tokenizer, recipe.data.packing, recipe.batch.row_tokens)
    with Workers(make, processes, "prepares rows", MEMORY_HINT) as workers:
        for plan in missing:
            if plan.name in last:
                _report_changes(plan, last[plan.name], progress)
            with _held(plan.folder, progress):
                there = shared and shared / "rows" / plan.folder.name
                is_here = (plan.folder / META_FILE).exists()
                if not (is_here or copy_entry(there, plan.folder, progress)):
                    _prepare_source(plan, sides, workers, progress)
    if shared is not None:
        _share(plans, shared, progress)
    folders = {plan.name: plan.folder for plan in plans}
    if folders != last:
        names = {name: folder.name for name, folder in folders.items()}
        with contextlib.suppress(OSError):  # nothing depends on the note
            atomic.write(note, json.dumps(names) + "\n")
    return Prepared(
        train={name: Rows(folder, "train") for name, folder in folders.items()},
        heldout={name: Rows(folder, "heldout") for name, folder in folders.items()},
    )


def _share(plans: list[_Plan], shared: Remote, progress: Progress) -> None:
    """Raises: DataError for rows that are damaged by now."""
    for plan in plans:
        splits = [Rows(plan.folder, split) for split in SPLITS]
        share_entry(
            shared / "rows" / plan.folder.name,
            sorted(plan.folder.iterdir()),
            progress,
            lambda splits=splits: [rows.verify() for rows in splits],
        )


def last_rows(recipe: Recipe, mixture: Mixture, cache: Path) -> tuple[Path, dict[str, Path]]:
    """The note of the rows that these settings were last given, and their folders by source.

    What is in the files of the sources does not count.
    """
    settings = {
        "tokenizer": recipe.data.tokenizer.model_dump(mode="json"),
        "vocab_size": recipe.model.vocab_size,
        "packing": recipe.data.packing,
        "row_tokens": recipe.batch.row_tokens,
        "heldout_frac": mixture.heldout_frac,
        "sources": {
            name: source.model_dump(mode="json", include={"path", *READ_SETTINGS})
            for name, source in mixture.sources.items()
        },
    }
    note = cache_path(cache, "mixtures", json_digest(settings)[:16])
    try:
        names = parse_as(dict[str, str], read_file(note))
    except (OSError, ValueError):
        names = {}
    return note, {name: cache_path(cache, "rows", folder) for name, folder in names.items()}


def _plans(
    recipe: Recipe, mixture: Mixture, tokenizer: Tokenizer, sides: Sides, cache: Path
) -> list[_Plan]:
    """The folder of the rows of every source, and everything that they depend on."""
    common = {
        "format": ROWS_FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "packing": recipe.data.packing,
        "row_tokens": recipe.batch.row_tokens,
        **sides.inputs(),
    }
    if not tokenizer.keeps_text:
        # Before, each slice of a long document was normalised for itself, and nothing was counted.
        common["encoding"] = 2
    plans = []
    for name, source in mixture.sources.items():
        inputs = {**common, **source_inputs(source, name)}
        safe = re.sub(r"[^\w.-]", "_", name)[:50]  # at most 200 bytes, of the 255 of a file's name
        folder = cache_path(cache, "rows", f"{safe}-{json_digest(inputs)[:16]}")
        num_bytes = sum(entry[1] for entry in inputs["files"])
        plans.append(_Plan(name, source, inputs, folder, num_bytes))
    return plans


def _warn_of_copies(plans: list[_Plan], progress: Progress) -> None:
    """Files with the same content in a source, and sources that read the same file in the same
    way: their documents count twice."""
    readers: dict[str, str] = {}
    for plan in plans:
        seen: dict[str, str] = {}
        common: dict[str, str] = {}
        for file, num_bytes, digest in plan.inputs["files"]:
            other = seen.setdefault(digest, file)
            if other != file and num_bytes and not file.endswith(".py"):
                progress.warn(f"source `{plan.name}`: `{other}` and `{file}` have the same content")
            how = json.dumps([digest, plan.inputs["source"], plan.inputs["part"]], sort_keys=True)
            reader = readers.setdefault(how, plan.name)
            if reader != plan.name and num_bytes:
                common.setdefault(reader, file)
        for other, file in common.items():
            progress.warn(f"sources `{other}` and `{plan.name}` have the same content (`{file}`)")


def _report_changes(plan: _Plan, last: Path, progress: Progress) -> None:
    """Says which files differ from those that the source's last rows were made of."""
    with contextlib.suppress(DataError):
        files = (read_rows_meta(last).inputs.files, plan.inputs["files"])
        before, now = ({name: rest for name, *rest in each} for each in files)
        changed = sorted(name for name in before | now if before.get(name) != now.get(name))
        if changed:
            which = ", ".join(f"`{name}`" for name in changed[:3])
            progress.say(f"source `{plan.name}` has changed ({which}) and is prepared again")


def _held(folder: Path, progress: Progress) -> IO[str]:
    """The lock of a folder, which only one process at a time builds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return hold(
        folder.with_name(f".{folder.name}.lock"),
        lambda holder: progress.say(f"waiting for {holder}, which prepares {folder.name}"),
    )


def _prepare_source(plan: _Plan, sides: Sides, workers: Workers, progress: Progress) -> None:
    building = plan.folder.with_name(f".{plan.folder.name}.parts")
    building.mkdir(exist_ok=True)
    reading = Reading()
    folders: list[Path] = []
    total_kb, shown_kb = max(plan.num_bytes >> 10, 1), 0
    with progress.phase(f"preparing {plan.name}", total_kb, "KB") as phase:
        divided = sides.divide(documents(plan.source, plan.name, reading))
        for part in cut(divided, part_chars(plan.num_bytes)):
            folders.append(building / f"{len(folders):05d}")
            if finished_part(folders[-1]) is None:
                workers.submit(folders[-1], part)
            done_kb = min(reading.done_bytes >> 10, total_kb)
            phase.advance(done_kb - shown_kb)
            shown_kb = done_kb
        workers.wait()
        phase.advance(total_kb - shown_kb)
    if source_inputs(plan.source, plan.name)["files"] != plan.inputs["files"]:
        shutil.rmtree(building)  # its parts are of another content than their folder's name says
        raise DataError(
            f"source `{plan.name}`: its files were changed while they were read",
            hint="run again when nothing writes to them",
        )
    if not folders:
        raise DataError(
            f"source `{plan.name}`: no documents ({reading.num_read} read, {reading.num_empty} "
            f"empty, {reading.num_short} shorter than `min_chars`, {reading.num_unmatched} not "
            "matching `where`)"
        )
    content = {
        "fingerprint": json_digest(plan.inputs),
        "inputs": plan.inputs,
        "row_tokens": plan.inputs["row_tokens"],
        "reading": reading.counts(),
    }
    join_parts(folders, content, plan.folder)
    shutil.rmtree(building)
    _summarise(plan, reading, progress)


def _summarise(plan: _Plan, reading: Reading, progress: Progress) -> None:
    rows, heldout = Rows(plan.folder, "train"), Rows(plan.folder, "heldout")
    total = rows.counts + heldout.counts
    dropped = reading.num_empty + reading.num_short
    name = f"source `{plan.name}`"
    progress.say(
        f"{name}: {rows.counts.num_documents:,} documents in {len(rows):,} rows "
        f"({rows.utilisation:.1%} filled), {heldout.counts.num_documents:,} held out"
        + (f", {dropped:,} empty or short ones dropped" if dropped else "")
    )
    if reading.num_replaced:
        progress.warn(
            f"{name}: {reading.num_replaced:,} documents have bytes that are not UTF-8 "
            "(replaced by U+FFFD)"
        )
    if total.num_changed:
        progress.warn(
            f"{name}: the tokenizer changes the text of {total.num_changed:,} of "
            f"{total.num_documents:,} documents; {total.num_unknown:,} of its tokens stand for "
            "unknown text"
        )
    share, frac = heldout.counts.num_tokens / total.num_tokens, plan.inputs["heldout_frac"]
    if share > MAX_HELDOUT_SHARE + 2 * frac:
        progress.warn(
            f"{name}: {share:.0%} of its tokens are held out, with `heldout_frac` {frac:g}: "
            f"{heldout.counts.num_documents:,} of {total.num_documents:,} documents, which are "
            "held out whole; shorter documents come closer"
        )
