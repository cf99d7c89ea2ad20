"""Sources to rows, once: tokenise, pack, write, remember by fingerprint.

A prepared source is a folder `rows/<name>-<fingerprint>` in the cache; the fingerprint covers the
source's settings, the content of its files, tokenizer, packing and row length. A folder appears
whole or not at all: it is built next to its place part by part (`parts.py`) under a lock, and
finished parts are found again after an interruption. How rows look on disk is `rows.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from glamcli.config.mixtures import Mixture, Source
from glamcli.config.schema import Recipe
from glamcli.data.cache import cache_path, json_digest
from glamcli.data.parts import (
    DOCUMENTS_FILE,
    KEPT_CHARS,
    KEPT_DOCUMENTS,
    SPLITS,
    Part,
    finished_part,
)
from glamcli.data.rows import META_FILE, Counts, Rows, read_meta, shard_name, write_meta
from glamcli.data.sources import Reading, documents, source_inputs
from glamcli.data.split import Sides, divide_mixture
from glamcli.data.tokenizer import Tokenizer
from glamcli.data.workers import Workers
from glamcli.errors import DataError
from glamcli.hosts.lock import hold
from glamcli.progress import Progress

# Part of every fingerprint: raise it when the same inputs would give other rows.
ROWS_FORMAT = 3
# Warned of when so much more of a source is held out than twice what the mixture asks for.
MAX_HELDOUT_SHARE = 0.05
# Text in one part: small enough to share out a small corpus, larger when that gives many parts.
PART_CHARS = 1 << 19
MAX_PART_CHARS = 1 << 26
PARTS_WANTED = 256
# Less than this is prepared before other processes would have started.
WORTH_PROCESSES_BYTES = 4 << 20


@dataclass(frozen=True)
class Prepared:
    """Rows of every source of a mixture, by source name."""

    train: dict[str, Rows]
    heldout: dict[str, Rows]

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of every source's rows: of what they are, not of how they were made."""
        return {
            name: json_digest([self.train[name].digests, self.heldout[name].digests])
            for name in self.train
        }

    def heldout_documents(self, name: str) -> list[str]:
        """Texts of held-out documents, in their order: at most 512, or 1 Mi characters."""
        folder = self.train[name].folder
        data = (folder / DOCUMENTS_FILE).read_bytes()
        if hashlib.sha256(data).hexdigest() != read_meta(folder)["documents_sha256"]:
            raise DataError(f"{folder / DOCUMENTS_FILE}: changed since it was written")
        return [json.loads(line)["text"] for line in data.splitlines()]

    def verify(self, progress: Progress) -> None:
        """Reads every file again. Raises: DataError naming the first damaged one."""
        for name in self.train:
            self.train[name].verify(progress)
            self.heldout[name].verify(progress)
            self.heldout_documents(name)


@dataclass(frozen=True)
class _Plan:
    """A source, and the folder its rows belong in."""

    name: str
    source: Source
    inputs: dict[str, Any]
    folder: Path
    num_bytes: int

    @property
    def fingerprint(self) -> str:
        return json_digest(self.inputs)


def prepare(
    recipe: Recipe, mixture: Mixture, tokenizer: Tokenizer, cache: Path, progress: Progress
) -> Prepared:
    """Rows of every source of the mixture, prepared now unless they are in the cache.

    Raises: DataError for a source that cannot be read, and for a damaged prepared folder.
    """
    sides = divide_mixture(mixture, cache, progress)
    plans = _plans(recipe, mixture, tokenizer, sides, cache)
    _warn_of_copies(plans, progress)
    missing = [plan for plan in plans if not (plan.folder / META_FILE).exists()]
    small = sum(plan.num_bytes for plan in missing) < WORTH_PROCESSES_BYTES
    with Workers(tokenizer, 1 if small else recipe.data.prepare_processes) as workers:
        for plan in missing:
            _tell_what_changed(plan, progress)
            with _held(plan.folder, progress):
                if not (plan.folder / META_FILE).exists():
                    _prepare_source(plan, sides, workers, progress)
    return Prepared(
        train={plan.name: Rows(plan.folder, "train") for plan in plans},
        heldout={plan.name: Rows(plan.folder, "heldout") for plan in plans},
    )


def _plans(
    recipe: Recipe, mixture: Mixture, tokenizer: Tokenizer, sides: Sides, cache: Path
) -> list[_Plan]:
    """Where the rows of every source belong."""
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
        folder = cache_path(cache, "rows", f"{_safe(name)}-{json_digest(inputs)[:16]}")
        num_bytes = sum(entry[1] for entry in inputs["files"])
        plans.append(_Plan(name, source, inputs, folder, num_bytes))
    return plans


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


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


def _tell_what_changed(plan: _Plan, progress: Progress) -> None:
    """Says which files differ from the last time this source was prepared the same way."""
    for folder in plan.folder.parent.glob(f"{_safe(plan.name)}-*"):
        try:
            old = read_meta(folder)["inputs"]
        except DataError:
            continue
        if {**old, "files": None} != {**plan.inputs, "files": None}:
            continue
        before, now = ({name: rest for name, *rest in x["files"]} for x in (old, plan.inputs))
        changed = [name for name in now if before.get(name) != now[name]]
        gone = [name for name in before if name not in now]
        which = ", ".join(f"`{name}`" for name in (changed + gone)[:3])
        progress.say(f"source `{plan.name}` changed since it was prepared ({which}): again")
        return


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
    num_parts = 0
    total_kb = max(plan.num_bytes >> 10, 1)
    with progress.phase(f"preparing {plan.name}", total_kb, "KB") as phase:
        shown_kb = 0

        def show(done_kb: int) -> None:
            nonlocal shown_kb
            phase.advance(done_kb - shown_kb)
            shown_kb = done_kb

        texts = documents(plan.source, plan.name, reading)
        for texts_of_part in _cut(sides.divide(texts), plan.num_bytes):
            folder = building / f"{num_parts:05d}"
            num_parts += 1
            if finished_part(folder) is None:
                part = Part(
                    folder, texts_of_part, plan.inputs["packing"], plan.inputs["row_tokens"]
                )
                workers.submit(part)
            show(min(reading.done_bytes >> 10, total_kb))
        workers.wait()
        show(total_kb)
    if num_parts == 0:
        raise DataError(
            f"source `{plan.name}`: no documents ({reading.num_read} read, {reading.num_empty} "
            f"empty, {reading.num_short} shorter than `min_chars`, {reading.num_unmatched} not "
            "matching `where`)"
        )
    _finish(plan, building, num_parts, reading)
    _summarise(plan, reading, progress)


def _cut(divided: Iterator[tuple[str, bool]], num_bytes: int) -> Iterator[list[tuple[str, bool]]]:
    """Documents in parts of about equal text."""
    limit = min(max(PART_CHARS, num_bytes // PARTS_WANTED), MAX_PART_CHARS)
    part: list[tuple[str, bool]] = []
    num_chars = 0
    for document in divided:
        part.append(document)
        num_chars += len(document[0])
        if num_chars >= limit:
            yield part
            part, num_chars = [], 0
    if part:
        yield part


def _finish(plan: _Plan, building: Path, num_parts: int, reading: Reading) -> None:
    """Joins the parts in a folder, which then gets its name."""
    folders = [building / f"{number:05d}" for number in range(num_parts)]
    parts = [finished_part(folder) for folder in folders]
    if None in parts:
        raise DataError(f"{folders[parts.index(None)]}: disappeared while it was being written")
    joined = building / "joined"
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    content: dict[str, Any] = {
        "fingerprint": plan.fingerprint,
        "inputs": plan.inputs,
        "row_tokens": plan.inputs["row_tokens"],
        "reading": reading.counts(),
        "splits": {},
    }
    for split in SPLITS:
        counts = Counts()
        shards = []
        made = [
            (f, p[split]) for f, p in zip(folders, parts, strict=True) if p and p[split]["shard"]
        ]
        for number, (folder, part) in enumerate(made):
            name = shard_name(split, number, len(made))
            _link(folder / split, joined / name)
            shards.append({**part["shard"], "file": name})
            counts.add(Counts(**part["counts"]))
        content["splits"][split] = {"shards": shards, "counts": counts.as_dict()}
    kept = _kept_documents(folders)
    (joined / DOCUMENTS_FILE).write_bytes(kept)
    content["documents_sha256"] = hashlib.sha256(kept).hexdigest()
    write_meta(joined, content)
    shutil.rmtree(plan.folder, ignore_errors=True)
    joined.rename(plan.folder)
    shutil.rmtree(building)


def _link(made: Path, path: Path) -> None:
    """A second name for a finished shard, or a copy where the file system has no links."""
    try:
        path.hardlink_to(made)
    except OSError:
        shutil.copyfile(made, path)


def _kept_documents(folders: list[Path]) -> bytes:
    lines: list[bytes] = []
    for folder in folders:
        lines += (folder / DOCUMENTS_FILE).read_bytes().splitlines(keepends=True)
        if len(lines) >= KEPT_DOCUMENTS or sum(map(len, lines)) >= KEPT_CHARS:
            break
    return b"".join(lines[:KEPT_DOCUMENTS])


def _summarise(plan: _Plan, reading: Reading, progress: Progress) -> None:
    train, heldout = (Rows(plan.folder, split).meta for split in SPLITS)
    dropped = reading.num_empty + reading.num_short
    progress.say(
        f"source `{plan.name}`: {train.num_documents:,} documents in {train.num_rows:,} rows "
        f"({train.utilisation:.1%} filled), {heldout.num_documents:,} held out"
        + (f", {dropped:,} empty or short ones dropped" if dropped else "")
    )
    if reading.num_replaced:
        progress.warn(
            f"source `{plan.name}`: {reading.num_replaced:,} documents have bytes that are not "
            "UTF-8 (replaced by U+FFFD)"
        )
    num_documents = train.num_documents + heldout.num_documents
    if num_changed := train.num_changed + heldout.num_changed:
        num_unknown = train.num_unknown + heldout.num_unknown
        progress.warn(
            f"source `{plan.name}`: the tokenizer changes the text of {num_changed:,} of "
            f"{num_documents:,} documents; {num_unknown:,} of its tokens stand for unknown text"
        )
    share = heldout.num_tokens / (train.num_tokens + heldout.num_tokens)
    if share > MAX_HELDOUT_SHARE + 2 * plan.inputs["heldout_frac"]:
        progress.warn(
            f"source `{plan.name}`: {share:.0%} of its tokens are held out, with `heldout_frac` "
            f"{plan.inputs['heldout_frac']:g}: {heldout.num_documents:,} of {num_documents:,} "
            "documents, which are held out whole; shorter documents come closer"
        )
