"""Examples of a prepared TFDS folder, for sources and evaluation tasks, and preparing one.

Only array_record folders can be read: the default format needs TensorFlow, which is not a
dependency of this package.
"""

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from glamcli.errors import DataError


def stored_examples(folder: Path | str, split: str | None) -> tuple[Any, str]:
    """The examples of a split, by random access, and its name (None: the only one there is).

    Raises: DataError for what is not a prepared folder, another file format than array_record, an
        unknown split.
    """
    import tensorflow_datasets as tfds  # slow to import, and few need it

    try:
        builder: Any = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS raises many kinds for a folder that is not a dataset
        raise DataError(
            f"`{folder}` cannot be read as a prepared TFDS folder: {_first_line(error)}",
            hint="name the folder of a version, for example `piqa/1.0.0`",
        ) from error
    splits = sorted(builder.info.splits)
    listed = ", ".join(f"`{each}`" for each in splits)
    split = split or (splits[0] if len(splits) == 1 else None)
    if split is None:
        raise DataError(f"`{folder}` has several splits: name a `split` of {listed}")
    stored_as = getattr(builder.info.file_format, "value", "in a format that TFDS does not know")
    if stored_as != "array_record":
        raise DataError(
            f"`{folder}` is stored as {stored_as}, which needs TensorFlow",
            hint='prepare it with `download_and_prepare(file_format="array_record")`',
        )
    try:
        return builder.as_data_source(split), split
    except (ValueError, KeyError, AssertionError) as error:
        raise DataError(f"`{folder}` has no split `{split}`; it has {listed}") from error


def stored_example(examples: Any, index: int, folder: Path | str) -> dict[str, Any]:
    """One example as it is stored: text as bytes, numbers as NumPy values.

    Raises: DataError for a damaged file.
    """
    try:
        return examples[index]
    except (RuntimeError, ValueError, IndexError, OSError) as error:  # from array_record
        raise DataError(f"{folder}: example {index} is damaged: {_first_line(error)}") from error


def prepared_examples(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The examples of one split in order, text decoded and arrays as lists.

    Raises: DataError as `stored_examples` and `stored_example`.
    """
    examples, _ = stored_examples(folder, split)
    for index in range(len(examples)):
        yield _plain(stored_example(examples, index, folder))


def prepare_directory(name: str, data_dir: Path, manual_dir: Path | None = None) -> None:
    """Lets TFDS download a dataset and prepare it as array_record in `data_dir` / `name`.

    `name` is `dataset[/config]/version`. Nothing is done when it is there already.

    Raises: DataError when it cannot be downloaded or prepared, with the reason TFDS gives.
    """
    dataset, version = name.rsplit("/", 1)
    # TFDS prints a banner on stdout when TensorFlow is not installed.
    with contextlib.redirect_stdout(io.StringIO()):
        import tensorflow_datasets as tfds

        # Builders register when their modules are imported, and these are not imported by name.
        import tensorflow_datasets.question_answering
        import tensorflow_datasets.text.super_glue

        tfds.disable_progress_bar()
        # SuperGLUE's builder names one dtype of TensorFlow and needs nothing else of it.
        if "tensorflow" not in sys.modules:
            module: Any = tensorflow_datasets.text.super_glue
            module.tf = SimpleNamespace(int32=np.int32, float32=np.float32)
        try:
            builder: Any = tfds.builder(
                f"{dataset}:{version}", data_dir=str(data_dir), file_format="array_record"
            )
            config = tfds.download.DownloadConfig(manual_dir=manual_dir)
            builder.download_and_prepare(download_config=config)
        except Exception as error:  # every kind, from the network, the disk and TFDS itself
            raise DataError(f"TFDS could not prepare `{name}`: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(value: Any) -> Any:
    """Bytes as text, NumPy values as Python ones, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value
