"""lm-eval on trained runs: `glam eval RUN --harness TASKS`, and `--model glam` of its own command.

Newer versions of lm-eval find `Glam` by the entry point that pyproject.toml declares. For 0.4.13,
which finds no plug-ins, `python -m glamcli.cli.harness` is its command with this model added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from glamcli.cli import render
from glamcli.cli.several import prepare_process
from glamcli.errors import RecipeError
from glamcli.evals.harness import Model, as_json, command_line, run
from glamcli.evals.results.journal import Journal
from glamcli.evals.results.scores import file_name
from glamcli.evals.results.store import RESULTS_FOLDER, free_path, items_path
from glamcli.progress import Progress
from glamcli.trained import Trained, open_trained

COLUMNS = ("task", ">shots", "metric", "filter", ">value", ">error", ">items")


class Glam(Model):
    """A run folder or a checkpoint as a model of lm-eval."""

    def __init__(self, path: str, **ignored: Any):
        # Batches follow from tokens, and devices from the process: `batch_size`, `device` and
        # the like, which lm-eval passes unasked, have no meaning here.
        del ignored
        prepare_process(Path(path))
        super().__init__(open_trained(Path(path), render.make_progress()))


def score(
    trained: Trained,
    journal: Journal,
    tasks: Sequence[str],
    include_path: Path | None,
    shots: Sequence[int | str] | None,
    limit: int | None,
    seed: int,
    run_dir: Path | None,
    progress: Progress,
    to_json: bool,
) -> int:
    """Runs lm-eval's tasks, shows what it reports and keeps it in the run folder."""
    count = _one(shots)
    with progress.phase("evaluating", unit="requests") as phase:
        model = Model(trained, journal, phase.advance)
        results = run(model, tasks, include_path=include_path, shots=count, limit=limit, seed=seed)
    samples = results.pop("samples", {})
    if to_json:
        content = json.loads(as_json(results))
        click.echo(json.dumps({"event": "harness", **content}))
    else:
        versions = f"lm-eval {results['lm_eval_version']}, step {trained.identity.get('step')}"
        render.print_table(COLUMNS, _rows(results), title=versions)
    if run_dir is not None:
        folder = run_dir / RESULTS_FOLDER / "harness"
        keep(results, samples, folder, _name(tasks, trained, count, limit, seed), progress)
    journal.finish()
    return 0


def _one(counts: Sequence[int | str] | None) -> int | None:
    """The one number of shots that lm-eval takes; None for the task's own."""
    if counts is None or list(counts) == ["few"]:
        return None
    if len(counts) != 1 or not isinstance(counts[0], int):
        raise RecipeError("--harness: lm-eval takes one number of shots, such as `--shots 5`")
    return counts[0]


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """One row per metric, as lm-eval names them: `metric,filter`."""
    rows = []
    shots, counts = results.get("n-shot", {}), results.get("n-samples", {})
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, of = key.partition(",")
            if not of or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{of}")
            items = counts.get(task, {}).get("effective", "")
            rows.append([task, str(shots.get(task, "")), metric, of, _number(value),
                         "± " + _number(error) if isinstance(error, float) else "",
                         str(items)])  # fmt: skip
    return rows


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _name(
    tasks: Sequence[str],
    trained: Trained,
    shots: int | None,
    limit: int | None,
    seed: int,
) -> str:
    asked = "+".join(tasks).replace("/", "-")[:80]
    model = {**trained.identity, "dispatch": trained.dispatch}
    counts = None if shots is None else [str(shots)]
    return file_name(asked, model, shots=counts, limit=limit, seed=seed)


def keep(
    results: dict[str, Any],
    samples: dict[str, Any],
    folder: Path,
    name: str,
    progress: Progress,
) -> None:
    """Writes NAME.json and NAME.items.jsonl, or NAME-2 where something else has the name."""
    text = as_json(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        summary = free_path(folder, name, partial(_is_same, json.loads(text)))
        items = items_path(summary)
        with items.open("w", encoding="utf-8") as file:
            for task, each in ((task, each) for task, some in samples.items() for each in some):
                line = {"task": task, **json.loads(as_json(each))}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        summary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        progress.warn(f"results were not kept: {error.strerror or error}: {folder}")
        return
    progress.say(f"kept in {summary}, items in {items.name}")


def _is_same(content: dict[str, Any], path: Path) -> bool:
    """Whether a file holds results of the same tasks on the same items."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        return all(other[key] == content[key] for key in ("configs", "task_hashes"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    command_line("glamcli.cli.harness:Glam")
