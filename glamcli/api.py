"""The Python interface, which `import glamcli` offers: open a run, use its model, train one.

Documented in docs/python.md. `glamcli.open` is `open_run`, `glamcli.load_recipe` `find_recipe` and
`glamcli.train` `train_run`: one name, one home. A `Run` adds texts and names to a `Trained`; it
computes with the code of the commands, to the same results. Only `glamcli/__init__` imports this
module.
"""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glamcli.cli import render
from glamcli.config import load
from glamcli.config.files import run_folder
from glamcli.config.schema import Recipe
from glamcli.config.sharding import Axes
from glamcli.data.tokenizer import Tokenizer
from glamcli.decoding import Decoding
from glamcli.errors import CheckpointError, DataError
from glamcli.evals.results.scores import Results
from glamcli.evals.results.store import keep_results
from glamcli.evals.run import evaluate, resumable
from glamcli.evals.scheduled import score_during
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.requests import make_requests
from glamcli.evals.tasks.suites import check_suites, load_suite
from glamcli.generate import MIN_PROMPT, rounded_up
from glamcli.hosts.join import ALONE
from glamcli.memory import explaining_memory
from glamcli.model.decoder import Decoder
from glamcli.named_leaves import named_leaves
from glamcli.parallel.mesh import whole, with_mesh_of
from glamcli.progress import Progress, Silent
from glamcli.storage import place
from glamcli.stored_runs import local
from glamcli.train import loop
from glamcli.train.metric_files import read_metrics
from glamcli.trained import Trained, keep_compiled_programs, open_trained


class Param(NamedTuple):
    """A parameter of a model."""

    value: jax.Array
    axes: Axes
    """the logical name of each dimension, such as ("layers", "embed", "mlp")."""


class Run:
    """A trained model with its run folder; made by `glamcli.open` and `glamcli.train`."""

    def __init__(self, trained: Trained, progress: Progress):
        self._trained = trained
        self._progress = progress

    def __repr__(self) -> str:
        return f"<glamcli.Run {self._trained.identity['run']} at step {self.step}>"

    @property
    def recipe(self) -> Recipe:
        """Every setting of the run, typed and frozen."""
        return self._trained.recipe

    @property
    def step(self) -> int:
        """The training step of these weights."""
        return self._trained.identity["step"]

    @property
    def tokenizer(self) -> Tokenizer:
        """`encode` a text to ids (without BOS), `decode` ids to a text."""
        return self._trained.tokenizer

    @cached_property
    def params(self) -> dict[str, Param]:
        """The parameters by their names in the checkpoint (below `params/`), float32. Layers of a
        kind are stacked over the first dimension, `layers`."""
        params = self._trained.params
        axes = jax.tree.structure(params).flatten_up_to(self._trained.decoder.axes)
        named = zip(named_leaves(params).items(), axes, strict=True)
        return {name: Param(value, each) for (name, value), each in named}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's `metrics.jsonl`, oldest first, without damaged ones.

        Raises:
            CheckpointError: there is no such file, as beside a checkpoint outside of a run folder,
                or it cannot be read.
        """
        path = local(self._trained.run_dir or Path()) / "metrics.jsonl"
        try:
            return read_metrics(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None

    def logits(self, text: str) -> np.ndarray:
        """Float32 logits [S, V] of the next token after BOS and after each token of the text.

        Row 0 predicts the first token of the text and row S - 1 what follows it; S is one more
        than the text has tokens, V the recipe's `model.vocab_size`. No expert drops a token unless
        the recipe's `moe.eval_dispatch` says so, as in scoring.

        Raises:
            DataError: the text is longer than the rows the model was trained on.
        """
        trained = self._trained
        ids = trained.generator.encode(text)
        if len(ids) > trained.window:
            raise DataError(f"{len(ids)} tokens are more than the {trained.window} of a row")
        # Few lengths, hence few programs; padding has segment 0 and takes no part.
        padding = rounded_up(len(ids), MIN_PROMPT) - len(ids)
        tokens_1S = np.pad(np.array([ids], np.int32), ((0, 0), (0, padding)))
        segments_1S = np.pad(np.ones((1, len(ids)), np.int32), ((0, 0), (0, padding)))
        run = with_mesh_of(trained.params, _logits_program(trained.decoder))
        return whole(run(trained.params, tokens_1S, segments_1S))[0, : len(ids)]

    def loglikelihood(self, context: str, options: Sequence[str]) -> list[float]:
        """Log-likelihood in nats of each option as what follows the context: the numbers that
        `glam eval` compares. Options bring their own leading blank; a context that is too long
        loses its beginning, the same for all options.

        Raises:
            DataError: an option is longer than the rows the model was trained on.
        """
        trained = self._trained
        pairs = [(context, option) for option in options]
        requests = make_requests(trained.tokenizer, pairs, trained.window) if pairs else []
        if requests is None:
            raise DataError(f"an option is longer than the {trained.window} tokens of a row")
        (found,) = self._likelihoods.score([requests])
        return [each.total for each in found]

    def generate(self, prompt: str, **options: Any) -> list[str]:
        """Continuations of a prompt, without it: `samples` of them, by beam search best first.

        `options` are those of `glam generate`: `tokens`, `temperature`, `top_k`, `top_p`, `beam`,
        `alpha`, `seed` and `samples`, with its defaults.

        Raises:
            RecipeError: an option is out of its range.
        """
        return self._trained.generator.continuations(prompt, Decoding(**options))

    def evaluate(
        self,
        suite: str = "quick",
        *,
        shots: Sequence[int | str] | None = None,
        preset: str = "glam",
        limit: int | None = None,
        seed: int = 0,
        data_dir: str | Path | None = None,
    ) -> Results:
        """Scores on a suite or task, by name or file, as `glam eval` makes and keeps them.

        `shots` are numbers of demonstrations or "few" (None: the suite's), `limit` takes the first
        items of each task, `seed` draws demonstrations. Results are kept in the folder `eval` of
        the run, and an interrupted evaluation goes on there. Tasks that cannot be scored are in
        `failures` of the results.

        Raises:
            RecipeError: there is no such suite, or its file has mistakes.
        """
        trained, chosen = self._trained, load_suite(suite, preset)
        options: dict[str, Any] = {
            "shots": None if shots is None else tuple(shots),
            "limit": limit,
            "seed": seed,
            "data_dir": None if data_dir is None else place(str(data_dir)),
        }
        known = {"suite": (chosen.name, chosen.sha256, preset), **options}
        with resumable(trained, known, self._progress) as journal:
            results = evaluate(trained, chosen, progress=self._progress, journal=journal, **options)
            if trained.run_dir is not None:
                keep_results(results, trained.run_dir, self._progress)
        return results

    @cached_property
    def _likelihoods(self) -> Likelihoods:
        return Likelihoods.of(self._trained)


def open_run(
    path: str | Path, step: int | None = None, *, verbose: bool = False, strict: bool = False
) -> Run:
    """A trained run: the newest step of a run folder, another `step` of it, or a checkpoint; of a
    disk, or at a URL.

    A damaged step is left for the newest that is not, unless `strict`; `Run.step` is the step
    taken. With `verbose` it says what it does on stderr, as the commands do.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        PlanError: memory runs short.
        RecipeError: the path cannot be that of a run.
    """
    progress = _progress(verbose) if verbose else _Warning()
    with explaining_memory(lambda: "use a larger device"):
        return Run(open_trained(run_folder(path), progress, step=step, strict=strict), progress)


class _Warning(Silent):
    """Shows nothing but warnings, as Python does."""

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)


def find_recipe(name_or_path: str | Path, settings: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by its shipped name, file or run folder, with `settings` changed by dotted key.

    Raises:
        RecipeError: with every problem, and its place.
    """
    sets = [f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()]
    return load.load_recipe(name_or_path, sets).recipe


def train_run(recipe: Recipe, run_dir: str | Path, *, verbose: bool = False) -> Run:
    """Trains a recipe in a run folder, or goes on where its run there stopped; the finished run.

    As `glam train`, except for the recipe's `finish` section: call `evaluate` and `generate`.

    Raises:
        GlamError: see `glamcli.train.loop.train`; `Preempted` after Ctrl-C, with all saved.
    """
    folder, progress = run_folder(run_dir), _progress(verbose)
    check_suites(recipe)
    keep_compiled_programs(recipe)
    outcome = loop.train(recipe, folder, progress, ALONE, score_during)
    if outcome.model is None:  # it was finished already
        return Run(open_trained(folder, progress), progress)
    return Run(outcome.model.at(folder), progress)


def _progress(verbose: bool) -> Progress:
    return render.Plain(sys.stderr) if verbose else Silent()


@lru_cache(maxsize=8)
def _logits_program(decoder: Decoder) -> Any:
    def run(params: Any, tokens_BS: jax.Array, segments_BS: jax.Array) -> jax.Array:
        dispatch = decoder.eval_dispatch
        x_BSM, _ = decoder.hidden(params, tokens_BS, segments_BS, dispatch=dispatch)
        return decoder.logits(params, x_BSM).astype(jnp.float32)

    return jax.jit(run)
