"""Text to token ids and back: plain bytes, or a SentencePiece model.

Ids 0, 1, 2 are padding, end and begin of a document in both; `encode` adds no special ids. Which
text a model is trained on is decided in `vocabulary.py`. Nothing else imports sentencepiece.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from glamcli import atomic
from glamcli.config.schema import NUM_BYTE_IDS
from glamcli.errors import DataError
from glamcli.untrusted import read_file

PAD_ID, EOS_ID, BOS_ID = 0, 1, 2
NUM_SPECIAL = 3
# The copy of a SentencePiece model in a run folder.
TOKENIZER_FILE = "tokenizer.model"
# Longer texts are encoded in slices, so memory does not grow with a document.
SLICE_CHARS = 1 << 16
# A model of the largest vocabularies in use has a hundredth of this.
MAX_MODEL_BYTES = 1 << 30
# Stands for a space in SentencePiece's pieces.
MARK = "\N{LOWER ONE EIGHTH BLOCK}"
# Appended to a model, this turns off three fields of its `normalizer_spec`: `precompiled_charsmap`,
# `add_dummy_prefix` and `remove_extra_whitespaces` (sentencepiece_model.proto).
_NOT_NORMALISING = b"\x1a\x06\x12\x00\x18\x00\x20\x00"
# Case, white space and a ligature: a model that normalises changes some of it.
_PROBE = "A  \N{LATIN SMALL LIGATURE FI}\N{NO-BREAK SPACE}\n b "


class Bytes:
    """UTF-8 bytes: id 3 + byte."""

    kind = "bytes"
    vocab_size = NUM_BYTE_IDS
    fingerprint = hashlib.sha256(b"glam bytes tokenizer 1").hexdigest()
    pad_id, eos_id, bos_id = PAD_ID, EOS_ID, BOS_ID
    unk_id: int | None = None
    """stands for text that has no pieces."""
    keeps_text = True
    """whether `decode(encode(text))` is the text, whatever it is."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS."""
        return [NUM_SPECIAL + byte for byte in utf8(text)]

    def encode_chunks(self, text: str) -> Iterator[np.ndarray]:
        """The same ids as int32 arrays, for texts of any length."""
        for part in slices(text):
            yield np.frombuffer(utf8(part), np.uint8).astype(np.int32) + NUM_SPECIAL

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids add nothing, bytes that are not UTF-8 become U+FFFD."""
        data = bytes(i - NUM_SPECIAL for i in ids if NUM_SPECIAL <= i < self.vocab_size)
        return data.decode("utf-8", "replace")

    def piece(self, token_id: int) -> str:
        """One id as text for a table."""
        if token_id < NUM_SPECIAL:
            return ("<pad>", "</s>", "<s>")[token_id]
        if token_id >= self.vocab_size:
            return f"<{token_id}>"
        byte = token_id - NUM_SPECIAL
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"


class SentencePiece:
    """A SentencePiece model (Kudo and Richardson, arXiv:1808.06226) with our special ids."""

    kind = "sentencepiece"
    pad_id, eos_id, bos_id = PAD_ID, EOS_ID, BOS_ID

    def __init__(self, model: bytes, name: str):
        """Raises: DataError when `model` is not one, or its special ids are others."""
        self._model = model
        self.name = name
        try:
            self._processor = _processor(model)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{name}: not a SentencePiece model") from error
        ids = [self._processor.pad_id(), self._processor.eos_id(), self._processor.bos_id()]
        if ids != [PAD_ID, EOS_ID, BOS_ID]:
            raise DataError(
                f"{name}: its ids of padding, end and begin are {ids}, expected [0, 1, 2]",
                hint="train one with `glam tokenizer train`",
            )
        self.vocab_size: int = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        # The mark for a space inside pieces has to be encoded as bytes where a text contains it.
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in utf8(MARK)]
        self.unk_id: int | None = self._processor.unk_id()
        normalises = self._processor.normalize(_PROBE) != _PROBE.replace(" ", MARK)
        self.keeps_text = not normalises and self.unk_id not in self._mark_ids
        # For text that is normalised already, so that it can be encoded in slices.
        self._inner: Any = _processor(model + _NOT_NORMALISING) if normalises else None

    def encode(self, text: str) -> list[int]:
        return [int(token_id) for chunk in self.encode_chunks(text) for token_id in chunk]

    def encode_chunks(self, text: str) -> Iterator[np.ndarray]:
        clean = text if text.isascii() else utf8(text).decode()
        encoded = self._normalised(clean) if self._inner else map(self._encode_slice, slices(clean))
        for ids in encoded:
            yield np.array(ids, np.int32)

    def _encode_slice(self, text: str) -> list[int]:
        if MARK not in text:
            return self._processor.encode(text)
        first, *others = text.split(MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark_ids + self._processor.encode(part)
        return ids

    def _normalised(self, text: str) -> Iterator[list[int]]:
        """Ids for a model that adds or drops spaces at the ends of a text: at those of the whole
        document, not of its slices."""
        added = MARK if self._processor.normalize("a").startswith(MARK) else ""
        for number, part in enumerate(text.split(MARK)):
            normal = self._processor.normalize(part)
            if number:
                yield self._mark_ids
                normal = normal.removeprefix(added)
            yield from map(self._inner.encode, slices(normal, words=True))

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in ids if 0 <= i < self.vocab_size])

    def piece(self, token_id: int) -> str:
        if token_id >= self.vocab_size:
            return f"<{token_id}>"
        return self._processor.id_to_piece(token_id)

    def write(self, path: Path) -> None:
        """Writes the model file whole or not at all. Raises: DataError when that fails."""
        try:
            atomic.write(path, self._model)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePiece, (self._model, self.name)


Tokenizer = Bytes | SentencePiece
"""Both have the same attributes and methods."""


def _processor(model: bytes) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def load_sentencepiece(path: Path) -> SentencePiece:
    """The tokenizer in a model file. Raises: DataError when there is none."""
    try:
        model = read_file(path, MAX_MODEL_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    return SentencePiece(model, str(path))


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out_path: Path) -> SentencePiece:
    """Trains a model on the texts, writes it whole or not at all, and returns it.

    Byte pairs rather than the unigram model: the same number of bytes per token on documentation
    text at a tenth of the training time. Text is kept as it is (no Unicode normalisation, no
    added prefix space, no collapsed spaces), so `decode(encode(text))` is the text. The same texts
    give the same file.

    Raises: DataError when the texts have fewer pieces than that, or need more.
    """
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(part for text in texts for part in slices(text)),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            bos_id=BOS_ID,
            unk_id=NUM_SPECIAL,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * SLICE_CHARS,
            num_threads=1,  # written into the model file
            minloglevel=2,
        )
    except RuntimeError as error:
        what = f"cannot train a tokenizer of {vocab_size} pieces: "
        hint = None
        if most := re.search(r"value <= (\d+)", str(error)):
            what, hint = f"{what}the text has only {most[1]}", f"use {most[1]} or fewer"
        elif least := re.search(r"\d+ vs (\d+)", str(error)):
            what, hint = f"{what}the text needs at least {least[1]}", f"use {least[1]} or more"
        else:
            is_empty = "sentences_.empty()" in str(error)
            what += "there is no text to train on" if is_empty else str(error)
        raise DataError(what, hint) from error
    trained = SentencePiece(out.getvalue(), str(out_path))
    trained.write(out_path)
    return trained


def slices(text: str, num_chars: int | None = None, words: bool = False) -> Iterator[str]:
    """The text in pieces of at most `num_chars` (by default `SLICE_CHARS`), cut after a line or
    before a space if it can; with `words`, only before the marks of SentencePiece for spaces."""
    size = num_chars or SLICE_CHARS
    start = 0
    while len(text) - start > size:
        middle, limit = start + size // 2, start + size
        if words:
            end = text.rfind(MARK, middle, limit)
            while end > start and text[end - 1] == MARK:  # several may be one piece
                end -= 1
        else:
            end = text.rfind("\n", middle, limit) + 1 or text.rfind(" ", middle, limit)
        end = end if end > start else limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def utf8(text: str) -> bytes:
    """UTF-8 of any string; lone surrogates, which have none, become question marks."""
    return text.encode("utf-8", "replace")
