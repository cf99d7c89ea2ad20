"""The evaluations that a recipe schedules at steps of its training.

Called by `glam train` and `glamcli.train`; training itself knows nothing about tasks.
"""

from collections.abc import Callable

from glamcli.evals.run import evaluate
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Progress
from glamcli.trained import Trained


def score_during(
    trained: Trained, progress: Progress, between_batches: Callable[[], None]
) -> dict[str, float]:
    """Scores of the recipe's `eval` section by name, for the metrics of the run."""
    asked = trained.recipe.eval
    suite = load_suite(asked.suite)
    results = evaluate(
        trained,
        suite,
        progress=progress,
        shots=asked.shots,
        limit=asked.limit,
        between_batches=between_batches,
    )
    for failure in results.failures:
        progress.warn(f"task `{failure.task}` was not scored: {failure.error.what}")
    return results.curves()
