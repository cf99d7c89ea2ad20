"""A run's folder: locking it, comparing what it contains with the run that starts, and the files
beside the checkpoints."""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from glamcli import atomic
from glamcli.checkpoint import Checkpoints
from glamcli.config.dump import dump
from glamcli.config.schema import Recipe
from glamcli.data.open import Dataset
from glamcli.data.tokenizer import TOKENIZER_FILE, SentencePiece, Tokenizer
from glamcli.errors import CheckpointError, RecipeError, first_of
from glamcli.hosts.join import Host
from glamcli.hosts.lock import locked
from glamcli.named_leaves import SHOWN_DIFFERENCES
from glamcli.progress import Progress
from glamcli.step_folders import (
    NEWER,
    SET_ASIDE,
    damaged_steps,
    describing,
    refusal,
    steps_aside,
)
from glamcli.storage import Remote
from glamcli.train import bucket, identity
from glamcli.train.rewind import skipped_at

# Patterns of file names, which orbax looks for its own files by, and what looks like a URL.
NO_CHECKPOINTS_BELOW = re.compile(r"[*?\[\]\\]|:(?=/|$)")


def take_folder(run_dir: Path, host: Host, stack: ExitStack) -> None:
    """Locks the run folder, in the first process; all of them check that they see the same one.

    Raises: CheckpointError when another run uses it, or a process does not see it; RecipeError when
        checkpoints that are saved below such a path could not be read.
    """
    if found := NO_CHECKPOINTS_BELOW.search(str(run_dir.absolute())):
        raise RecipeError(
            f"no checkpoints can be kept in {run_dir.absolute()}: orbax takes `{found[0]}` in a "
            "path for something else",
            hint="give another folder with `--run`",
        )
    if host.is_first:
        stack.enter_context(locked(run_dir))
    apart = [host.name(index) for index, sees in enumerate(host.shares(run_dir)) if not sees]
    if apart:
        raise CheckpointError(
            f"{', '.join(apart)} does not see the run folder {run_dir} of {host.name(0)}",
            hint="several machines need a run folder on a shared file system",
        )


def newest(checkpoints: Checkpoints, host: Host) -> tuple[int, dict[str, Any]]:
    """The newest step that is complete by its description, as the first process sees it, and its
    metadata; 0 and nothing for a new run.

    Raises: CheckpointError when there are checkpoints and none can be used, all are set aside, or a
        later one is of a newer version.
    """
    folder, step, saved, damaged, aside = checkpoints.folder, None, {}, {}, []
    if host.is_first:
        step, damaged, aside = checkpoints.latest(), damaged_steps(folder), steps_aside(folder)
        saved = {} if step is None else checkpoints.meta(step)
    step, saved, damaged, aside = host.gather("newest step", [step, saved, damaged, aside])[0]
    for name, reason in damaged.items():
        if reason == NEWER and int(name) > (step or 0):
            raise refusal(folder / name, reason)
    if step is not None:
        return step, saved
    if damaged:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
        raise CheckpointError(
            f"{folder} holds checkpoints, but none that can be used ({reasons})",
            hint="start again in another folder with `--run`, or with `--fresh`",
        )
    if aside:
        raise CheckpointError(
            f"{folder} holds no step to continue from: all are set aside ({', '.join(aside)})",
            hint=f"move one back from `{SET_ASIDE}`, or start again with `--fresh`",
        )
    return 0, {}


def after_rewinds(
    run_dir: Path, step: int, saved: Mapping[str, Any], last: int, host: Host
) -> tuple[int, dict[str, Any]]:
    """How many batches a run that continues from `step` has consumed, with those that it leaves out
    because it was rewound; and every range [first, end) left out so far, as `skipped_batches`.

    Raises: CheckpointError when nothing would be left of `last` steps.
    """
    skip = skipped_at(run_dir, step, saved.get("checksum")) if host.is_first else None
    skip = host.gather("skipped", skip)[0]
    start, skipped = step + skip, saved.get("skipped_batches", [])
    if start >= last:
        raise CheckpointError(
            f"{run_dir} skips batches up to {start}, which leaves nothing of {last} steps",
            hint="train for longer (`--set train.steps=N`), or rewind again and skip fewer",
        )
    return start, {"skipped_batches": [*skipped, [step, start]] if skip else skipped}


def refuse_other_recipe(run_dir: Path, step: int, saved: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises: CheckpointError when what is `saved` at `step` was trained with another recipe."""
    if saved:
        with describing(run_dir / "checkpoints" / str(step)):
            found = identity.recipe_differences(saved, recipe.model_dump(mode="json"))
        _refuse_differences(run_dir, step, found)


def check_resumption(
    run_dir: Path,
    step: int,
    saved: Mapping[str, Any],
    run_identity: Mapping[str, Any],
    dataset: Dataset,
    progress: Progress,
) -> None:
    """Compares the run with what is `saved` at `step`, and warns of what will not be the same.

    Raises: CheckpointError when the run in the folder is another one.
    """
    if saved:
        now = identity.at_step(run_identity, dataset, step)
        _refuse_differences(run_dir, step, identity.differences(saved, now))
        if reasons := identity.other_bits(saved, now):
            progress.warn(
                "the run continues, but not bit for bit as without the interruption: "
                + "; ".join(reasons)
            )


def _refuse_differences(run_dir: Path, step: int, differences: list[str]) -> None:
    if differences:
        shown = first_of(differences, SHOWN_DIFFERENCES)
        raise CheckpointError(
            f"{run_dir} (step {step}) is another run: " + "; ".join(shown),
            hint=f"continue with {run_dir / 'recipe.yaml'}, or train elsewhere with `--run`",
        )


def write_run_files(
    run_dir: Path, recipe: Recipe, about: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    """Writes the recipe, what else there is to say `about` the run, and its tokenizer beside the
    checkpoints.

    Raises: CheckpointError when the folder cannot be written.
    """
    if isinstance(tokenizer, SentencePiece):  # so that the run outlives its corpora
        tokenizer.write(run_dir / TOKENIZER_FILE)
    texts = {"recipe.yaml": dump(recipe), "run.json": json.dumps(about, indent=1) + "\n"}
    for path in map(run_dir.joinpath, texts):
        try:
            atomic.write(path, texts[path.name])
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def set_aside(run_dir: Path, progress: Progress) -> Path | None:
    """Renames an earlier run to `<run>.1`, `<run>.2`, ...: nothing is ever deleted. Its new name;
    None where there is none.

    Raises: CheckpointError when it is in use, or cannot be renamed.
    """
    if isinstance(run_dir, Remote):
        return bucket.move_run_aside(run_dir, progress)  # pyright: ignore[reportReturnType]
    if not run_dir.exists():
        return None
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    with locked(run_dir):
        pass  # nobody is using it
    try:
        run_dir.rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot rename {run_dir}: {error.strerror or error}") from error
    return target
