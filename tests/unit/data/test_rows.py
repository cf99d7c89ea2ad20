"""Damage to prepared rows is found when they are opened, read or verified, never trained on."""

import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest

from glamcli.data.rows import META_FILE, Counts, RowCodec, Rows, write_rows_meta, write_shard
from glamcli.errors import DataError

NUM_ROWS, ROW_TOKENS = 50, 32


def shard_name(number):
    return f"rows-train.array_record-{number:05d}-of-00002"


@pytest.fixture
def made():
    rng = np.random.default_rng(0)
    return rng.integers(0, 1 << 30, (NUM_ROWS, 3, ROW_TOKENS)).astype(np.int32)


@pytest.fixture
def folder(tmp_path, made):
    shards = []
    for number in range(2):
        path = tmp_path / shard_name(number)
        part = made[number * 25 : number * 25 + 25]
        shards.append(asdict(write_shard(path, ROW_TOKENS, part)))
    counts = Counts(num_rows=NUM_ROWS, num_documents=3, num_tokens=NUM_ROWS * ROW_TOKENS, max_id=9)
    splits = {"train": {"shards": shards, "counts": counts.as_dict()}}
    write_rows_meta(tmp_path, {"fingerprint": "f", "row_tokens": ROW_TOKENS, "splits": splits})
    return tmp_path


def test_rows_read_back_in_any_order_over_shards(folder, made):
    rows = Rows(folder, "train")
    assert len(rows) == NUM_ROWS
    for index in np.random.default_rng(1).permutation(NUM_ROWS):
        row = rows[index]
        assert list(row) == ["tokens", "targets", "segments"]
        np.testing.assert_array_equal(np.stack(list(row.values())), made[index])
        assert all(array.dtype == np.int32 for array in row.values())
    for outside in (-1, NUM_ROWS):
        with pytest.raises(IndexError):
            rows[outside]


def test_open_rows_travel_to_other_processes(folder):
    rows = Rows(folder, "train")
    first = rows[0]["tokens"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[0]["tokens"], first)


@pytest.mark.parametrize("length", [0, 30, 0.5, 0.999])
def test_a_truncated_file_is_refused_with_the_expected_size(folder, length):
    path = folder / shard_name(1)
    data = path.read_bytes()
    path.write_bytes(data[: int(length * len(data)) if length < 1 else length])
    with pytest.raises(DataError, match=f"-00001-of-00002: has .* expected {len(data)} bytes"):
        Rows(folder, "train")


def test_a_missing_file_is_refused(folder):
    (folder / shard_name(0)).unlink()
    with pytest.raises(DataError, match="-00000-of-00002: is missing"):
        Rows(folder, "train")


def test_every_flipped_byte_is_found_by_verify_and_none_is_read_silently(folder, made):
    path = folder / shard_name(0)
    intact = path.read_bytes()
    num_refused = 0
    for at in range(0, len(intact), 331):
        damaged = bytearray(intact)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        rows = Rows(folder, "train")
        with pytest.raises(DataError, match="checksum differs"):
            rows.verify()
        for index in range(25):
            try:
                row = rows[index]
            except DataError:
                num_refused += 1
            else:
                np.testing.assert_array_equal(np.stack(list(row.values())), made[index])
    assert num_refused > 10


def test_a_changed_description_is_refused(folder):
    Rows(folder, "train").verify()
    path = folder / META_FILE
    signed = json.loads(path.read_text())
    signed["content"]["row_tokens"] = 16
    path.write_text(json.dumps(signed))
    with pytest.raises(DataError, match="changed since it was written"):
        Rows(folder, "train")
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Rows(folder, "train")
    path.unlink()
    with pytest.raises(DataError, match="not a folder of prepared rows"):
        Rows(folder, "train")


@pytest.mark.parametrize("row_tokens", [1, 31, 32, 256, 4096])
def test_records_are_those_of_tensorflow_datasets(row_tokens):
    from tensorflow_datasets.proto import tf_example_pb2

    arrays = [np.arange(row_tokens, dtype=np.int32) + i for i in range(3)]
    codec = RowCodec(row_tokens)
    record = codec.encode(*arrays)
    features = tf_example_pb2.Example.FromString(record).features.feature
    for name, array in zip(("tokens", "targets", "segments"), arrays, strict=True):
        assert features[name].bytes_list.value[0] == array.tobytes()
    with pytest.raises(ValueError, match="not a row"):
        codec.decode(record[:-1])
    row = codec.decode(record)
    np.testing.assert_array_equal(np.stack(list(row.values())), np.stack(arrays))
