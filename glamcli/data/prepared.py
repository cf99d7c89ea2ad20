"""The rows of a mixture that `prepare.py` has made."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from glamcli.data.cache import json_digest
from glamcli.data.parts import DOCUMENTS_FILE
from glamcli.data.rows import Rows, damaged, read_rows_meta
from glamcli.errors import DataError
from glamcli.untrusted import parse_json, read_file


@dataclass(frozen=True)
class Prepared:
    """Rows of every source of a mixture, by source name."""

    train: dict[str, Rows]
    heldout: dict[str, Rows]

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of every source's rows: of what they are, not of how they were made."""
        splits = (self.train, self.heldout)
        return {
            name: json_digest([[s.rows_sha256 for s in rows[name].shards] for rows in splits])
            for name in self.train
        }

    def heldout_documents(self, name: str) -> list[str]:
        """Texts of held-out documents, in their order: at most 512, or 1 Mi characters."""
        folder = self.train[name].folder
        try:
            data = read_file(folder / DOCUMENTS_FILE)
        except OSError as error:
            raise damaged(folder / DOCUMENTS_FILE, error.strerror or str(error)) from error
        if hashlib.sha256(data).hexdigest() != read_rows_meta(folder).documents_sha256:
            raise damaged(folder / DOCUMENTS_FILE, "changed since it was written")
        try:
            return [str(parse_json(line)["text"]) for line in data.splitlines()]
        except (ValueError, LookupError, TypeError) as error:
            raise damaged(folder / DOCUMENTS_FILE, f"no documents: {error}") from error

    def damage(self, name: str, vocab_size: int) -> Iterator[DataError]:
        """Reads every file of a source again: what is wrong with each split and its documents."""
        splits = (self.train[name], self.heldout[name])
        for check in (*(rows.verify for rows in splits), lambda: self.heldout_documents(name)):
            try:
                check()
            except DataError as error:
                yield error
        for rows in splits:
            if rows.counts.max_id >= vocab_size:
                yield DataError(
                    f"{rows.folder}: token id {rows.counts.max_id} is outside the vocabulary of "
                    f"{vocab_size}"
                )
