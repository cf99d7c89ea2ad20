"""The evaluations that a recipe schedules: at steps of its training, and once at the end.

Called by `glam train` and `glamcli.train`; training itself knows nothing about tasks.
"""

from collections.abc import Callable

from glamcli.decoding import Sampling
from glamcli.evals.results.scores import Results
from glamcli.evals.run import evaluate
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Progress
from glamcli.trained import Trained

_SAMPLING = Sampling(temperature=0.6, top_p=0.95)


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


def score_at_end(trained: Trained, progress: Progress) -> Results | None:
    """Scores of the recipe's `finish` suite; None when it has none."""
    finish = trained.recipe.finish
    if finish.suite is None:
        return None
    return evaluate(trained, load_suite(finish.suite), progress=progress, shots=finish.shots)


def sample_at_end(trained: Trained) -> str | None:
    """A continuation of the recipe's `finish` prompt; None when it has none."""
    finish = trained.recipe.finish
    if finish.prompt is None:
        return None
    return trained.generator.texts(finish.prompt, _SAMPLING, tokens=finish.sample_tokens)[0]
