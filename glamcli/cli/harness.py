"""lm-eval on trained runs: `glam eval RUN --harness TASKS`, and `--model glam` of its own command.

Newer versions of lm-eval find `Glam` by the entry point that pyproject.toml declares. For 0.4.13,
which finds no plug-ins, `python -m glamcli.cli.harness` is its command with this model added.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from glamcli.cli import render
from glamcli.cli.main import complain
from glamcli.cli.several import prepare_process
from glamcli.config.files import run_folder
from glamcli.errors import GlamError, RecipeError
from glamcli.evals.harness import HarnessModel, command_line, run_tasks
from glamcli.evals.results.journal import Journal
from glamcli.evals.results.scores import file_name
from glamcli.evals.results.store import keep_harness
from glamcli.progress import Progress
from glamcli.trained import Trained, open_trained

COLUMNS = ("task", ">shots", "metric", "filter", ">value", ">error", ">items")


class Glam(HarnessModel):
    """A run folder or a checkpoint as a model of lm-eval; `strict` as for `glam eval`."""

    def __init__(self, path: str, strict: bool = False, **ignored: Any):
        # Batches follow from tokens, and devices from the process: `batch_size`, `device` and
        # the like, which lm-eval passes by itself, have no meaning here.
        del ignored
        folder = run_folder(path)
        prepare_process(folder)
        super().__init__(open_trained(folder, render.make_progress(), strict=strict))


def score_tasks(
    trained: Trained,
    journal: Journal,
    options: Mapping[str, Any],
    progress: Progress,
    to_json: bool,
) -> int:
    """Runs lm-eval's tasks, shows its results and keeps them in the run folder; the exit code."""
    options = {**options, "shots": _one(options["shots"])}
    with progress.phase("evaluating", unit="requests") as phase:
        results = run_tasks(HarnessModel(trained, journal, phase.advance), **options)
    samples = results.pop("samples", {})
    if to_json:
        render.emit("harness", **results)
    else:
        versions = f"lm-eval {results['lm_eval_version']}, step {trained.identity.get('step')}"
        render.print_table(COLUMNS, _rows(results), title=versions)
    if trained.run_dir is not None and trained.host.is_first:
        lines = ({"task": task, **each} for task, some in samples.items() for each in some)
        keep_harness(results, lines, trained.run_dir, _name(trained, options), progress)
    return 0


def _name(trained: Trained, options: Mapping[str, Any]) -> str:
    tasks = "+".join(options["tasks"]).replace("/", "-")[:80]
    model = {**trained.identity, "dispatch": trained.decoder.eval_dispatch}
    shots = None if options["shots"] is None else [str(options["shots"])]
    return file_name(tasks, model, shots=shots, limit=options["limit"], seed=options["seed"])


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


if __name__ == "__main__":
    try:
        command_line("glamcli.cli.harness:Glam")
    except GlamError as error:
        complain(error.what, error.hint)
        sys.exit(error.exit_code)
