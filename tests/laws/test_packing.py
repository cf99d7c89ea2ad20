"""Packing neither loses nor repeats a token, whatever the documents' lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamcli.data.pack import OPEN_ROWS, pack

BOS, EOS = 2, 1
FIRST = 10

lengths = st.one_of(
    st.lists(st.integers(0, 12), max_size=100), st.lists(st.integers(0, 200), max_size=12)
)


def numbered(sizes: list[int], chunk: int = 7) -> list[list[np.ndarray]]:
    """Documents of these sizes in which every token of the whole corpus is different."""
    out, start = [], FIRST
    for size in sizes:
        ids = np.arange(start, start + size, dtype=np.int32)
        out.append([ids[i : i + chunk] for i in range(0, size, chunk)])
        start += size
    return out


def pieces(rows: list) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every piece of every row."""
    out = []
    for tokens, targets, segments in rows:
        for number in range(1, segments.max(initial=0) + 1):
            here = segments == number
            out.append((tokens[here].tolist(), targets[here].tolist()))
    return out


def reassembled(rows: list) -> list[list[int]]:
    """Documents put together again: a piece that does not begin with BOS continues another."""
    begun = {p[0][1]: p for p in pieces(rows) if p[0][0] == BOS and p[0][1:]}
    single = [p for p in pieces(rows) if p[0] == [BOS]]
    begun |= {p[1][0]: p for p in single}
    following = {p[0][0]: p for p in pieces(rows) if p[0][0] != BOS}
    out = []
    for first in sorted(begun):
        tokens, targets = list(begun[first][0]), list(begun[first][1])
        while targets[-1] != EOS:
            more = following.pop(targets[-1])
            tokens += more[0]
            targets += more[1]
        assert tokens == [BOS, *targets[:-1]]
        out.append(targets)
    assert not following
    return out


@pytest.mark.parametrize("packing", ["fill", "whole"])
@given(sizes=lengths, row_tokens=st.integers(1, 40), chunk=st.integers(1, 50))
def test_targets_of_all_rows_are_the_documents_and_their_ends(packing, sizes, row_tokens, chunk):
    rows = list(pack(numbered(sizes, chunk), packing, row_tokens, BOS, EOS))
    expected = [
        [*np.concatenate(chunks).tolist(), EOS] for chunks in numbered(sizes, chunk) if chunks
    ]
    assert reassembled(rows) == expected


@pytest.mark.parametrize("packing", ["fill", "whole"])
@given(sizes=lengths, row_tokens=st.integers(1, 40))
def test_padding_is_at_the_end_of_a_row_and_zero(packing, sizes, row_tokens):
    for row in pack(numbered(sizes), packing, row_tokens, BOS, EOS):
        tokens, targets, segments = row
        assert all(part.dtype == np.int32 and part.shape == (row_tokens,) for part in row)
        num_real = int((segments > 0).sum())
        assert num_real > 0
        assert not segments[num_real:].any()
        assert not tokens[num_real:].any()
        assert not targets[num_real:].any()
        steps = np.diff(segments[:num_real], prepend=0)
        assert segments[0] == 1
        assert set(steps.tolist()) <= {0, 1}


@given(sizes=lengths, row_tokens=st.integers(1, 40))
def test_filled_rows_are_full_but_the_last(sizes, row_tokens):
    rows = list(pack(numbered(sizes), "fill", row_tokens, BOS, EOS))
    assert all((segments > 0).all() for _, _, segments in rows[:-1])
    assert len(rows) == -(-sum(size + 1 for size in sizes if size) // row_tokens)


@given(sizes=lengths, row_tokens=st.integers(1, 40))
def test_whole_packing_never_splits_a_document_that_fits(sizes, row_tokens):
    rows = list(pack(numbered(sizes), "whole", row_tokens, BOS, EOS))
    num_fitting = sum(0 < size < row_tokens for size in sizes)
    whole = [p for p in pieces(rows) if p[0][0] == BOS and p[1][-1] == EOS]
    assert len(whole) == num_fitting


def test_first_fit_wastes_less_than_a_twentieth_of_mixed_lengths():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, 5000).tolist()
    rows = list(pack(numbered(sizes), "whole", 256, BOS, EOS))
    used = sum(int((segments > 0).sum()) for _, _, segments in rows)
    assert used / (256 * len(rows)) > 0.95
    assert len(rows) > OPEN_ROWS


def test_a_document_far_longer_than_a_block_is_laid_out_in_bounded_pieces():
    num_tokens = 3_000_000
    chunks = (np.full(65_536, 7, np.int32) for _ in range(num_tokens // 65_536))
    num_rows = sum(1 for _ in pack([chunks], "fill", 256, BOS, EOS))
    assert num_rows == -(-(num_tokens // 65_536 * 65_536 + 1) // 256)
