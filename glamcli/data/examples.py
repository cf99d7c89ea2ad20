"""Examples of a prepared TFDS directory as plain dictionaries, and preparing one.

For evaluation tasks. Only array_record directories can be read: the default format needs
TensorFlow, which is not a dependency of this package.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from glamcli.errors import DataError


def prepared_examples(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The examples of one split, text decoded and arrays as lists.

    Raises:
        DataError: not a prepared directory, an unknown split, another file format, or a damaged
            file.
    """
    import tensorflow_datasets as tfds  # slow to import, and few tasks need it

    if not (folder / "dataset_info.json").is_file():
        raise DataError(
            f"{folder} is not a prepared TFDS directory: it has no `dataset_info.json`",
            hint="give the version folder, for example `piqa/1.0.0`",
        )
    try:
        builder: Any = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS raises many kinds for a folder that is not a dataset
        raise DataError(f"{folder}: cannot be read: {_first_line(error)}") from error
    known = ", ".join(f"`{name}`" for name in builder.info.splits)
    try:
        source: Any = builder.as_data_source(split=split)
    except (ValueError, KeyError):
        raise DataError(f"{folder} has no split `{split}`; it has {known}") from None
    except (NotImplementedError, ImportError):
        raise DataError(
            f"{folder} is stored as {builder.info.file_format}, which needs TensorFlow",
            hint='prepare it with `file_format="array_record"`',
        ) from None
    for index in range(len(source)):
        yield _example(source, index, f"{folder}: example {index}")


def prepare_directory(name: str, data_dir: Path, manual_dir: Path | None = None) -> None:
    """Has TFDS download a dataset and prepare it as array_record in `data_dir` / `name`.

    `name` is `dataset[/config]/version`. Nothing is done when it is there already.

    Raises:
        DataError: it cannot be downloaded or prepared, with the reason TFDS gives.
    """
    dataset, version = name.rsplit("/", 1)
    # TFDS greets with a banner on stdout when TensorFlow is not installed.
    with contextlib.redirect_stdout(io.StringIO()):
        import tensorflow_datasets as tfds

        # Builders are known once their modules are imported, and these are not imported by name.
        import tensorflow_datasets.question_answering
        import tensorflow_datasets.text

        tfds.disable_progress_bar()
        _spare_tensorflow()
        try:
            builder: Any = tfds.builder(
                f"{dataset}:{version}", data_dir=str(data_dir), file_format="array_record"
            )
            config = tfds.download.DownloadConfig(manual_dir=manual_dir)
            builder.download_and_prepare(download_config=config)
        except Exception as error:  # every kind, from the network, the disk and TFDS itself
            raise DataError(f"TFDS could not prepare `{name}`: {_first_line(error)}") from error


def _spare_tensorflow() -> None:
    """SuperGLUE's builder names one dtype of TensorFlow and needs nothing else of it."""
    import tensorflow_datasets.text.super_glue

    if "tensorflow" not in sys.modules:
        module: Any = tensorflow_datasets.text.super_glue
        module.tf = SimpleNamespace(int32=np.int32, float32=np.float32)


def _example(source: Any, index: int, place: str) -> dict[str, Any]:
    try:
        return _plain(source[index])
    except (RuntimeError, ValueError, IndexError, OSError) as error:  # from array_record
        raise DataError(f"{place} is damaged: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(value: Any) -> Any:
    """Bytes as text, NumPy values as Python ones, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value
