"""The lm-evaluation-harness on models of this project (the only importer of `lm_eval`).

An adapter that answers the harness's three kinds of requests by the rules of `glam eval`: BOS is
always first, trailing blanks of a context are scored with its continuation, and a context that is
too long loses its beginning, by the same number of tokens for all options of an item.

Called by `glam eval RUN --harness TASKS`, and by lm-eval's own command (`cli/harness.py`).
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glamcli.config.nearest import did_you_mean
from glamcli.data.tokenizer import Tokenizer
from glamcli.decoding import Sampling
from glamcli.errors import DataError, GlamError, RecipeError
from glamcli.evals.results.journal import Journal
from glamcli.evals.scoring.answer import best_texts
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.scoring.requests import Request, make_requests
from glamcli.trained import Trained

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, hash_string
except ImportError:
    raise RecipeError("lm-eval is not installed", hint="pip install 'glamcli[harness]'") from None

_MAX_GEN_TOKENS = 256
"""New tokens when a task does not say how many, as in lm-eval's own models."""


class HarnessModel(LM):
    """A trained model with lm-eval's interface: texts in, numbers and texts out."""

    def __init__(
        self,
        trained: Trained,
        journal: Journal | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ):
        super().__init__()
        self.trained = trained
        self.journal = journal or Journal()
        self.likelihoods = Likelihoods.of(trained, self.journal)
        self._advance = advance

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm-eval's caches of requests."""
        return self.trained.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the scores depend on, for lm-eval's results."""
        return {"glam": self.trained.described()}

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding produces it.

        Raises:
            DataError: a continuation is longer than the window.
        """
        encoder, window = self.trained.tokenizer, self.trained.window
        groups = []
        # Requests that follow each other and belong to one item are its options.
        for (task, number), some in itertools.groupby(
            requests, lambda each: (each.task_name, each.doc_id)
        ):
            made = make_requests(encoder, [request.args for request in some], window)
            if made is None:
                raise DataError(
                    f"task `{task}`: a continuation of item {number} is longer than the window of "
                    f"{window} tokens"
                )
            groups.append(made)
        found = self.likelihoods.score(groups, self._advance)
        answers = [(each.total, each.greedy) for group in found for each in group]
        return self._cached("loglikelihood", requests, answers)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Log-likelihood in nats of each text behind BOS, window by window."""
        encoder, window = self.trained.tokenizer, self.trained.window
        texts = [_rolling(encoder, request.args[0], window) for request in requests]
        flat = [[each] for windows in texts for each in windows]
        found = iter(self.likelihoods.score(flat))
        answers = []
        for windows in texts:
            answers.append(sum(next(found)[0].total for _ in windows))
            self._advance(1)
        return self._cached("loglikelihood_rolling", requests, answers)

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """What follows each context, up to a stop text; greedy unless the request samples."""
        asked = [_Wanted.of(request.args, self.trained) for request in requests]
        texts: dict[int, str] = {}
        greedy: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, each in enumerate(asked):
            if each.sampling is None:
                greedy.setdefault((each.num_tokens, each.stop), []).append(index)
            else:
                texts[index] = each.sample(self.trained, index)
                self._advance(1)
        generator = self.trained.generator
        for (num_tokens, stop), members in greedy.items():
            search = {"width": 1, "tokens": num_tokens, "alpha": 0.0, "stop": stop}
            prompts = [asked[index].ids for index in members]
            best = best_texts(prompts, search, generator, self._advance, self.journal)
            for index, found in zip(members, best, strict=True):
                texts[index] = found.text.removeprefix(asked[index].blanks)
        answers = [texts[index] for index in range(len(requests))]
        return self._cached("generate_until", requests, answers)

    def _cached(self, kind: str, requests: list[Any], answers: list[Any]) -> list[Any]:
        """The answers, passed to lm-eval's own cache (`--use_cache`) as well."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def _rolling(encoder: Tokenizer, text: str, window: int) -> list[Request]:
    """A text as windows that score each token once; the last one has as much context as fits.

    Only the first window begins with BOS, as in lm-eval's own models.
    """
    windows = get_rolling_token_windows(encoder.encode(text), encoder.bos_id, window, 1)
    return [Request((*inputs, scored[-1]), len(scored)) for inputs, scored in windows]


@dataclass(frozen=True)
class _Wanted:
    """One text to be generated."""

    ids: list[int]
    num_tokens: int
    stop: tuple[str, ...]
    blanks: str
    """trailing blanks of the context: the model generates them with its first word."""
    sampling: Sampling | None

    @classmethod
    def of(cls, args: Sequence[Any], trained: Trained) -> _Wanted:
        """A request in lm-eval's words. Contexts lose their beginning when they are too long; an
        answer may always take half of the window."""
        context, options = args
        until = options.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(each for each in until if each)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        given = (options[name] for name in names if options.get(name) is not None)
        wanted = int(next(given, _MAX_GEN_TOKENS))
        bos, *ids = trained.generator.encode(context.rstrip(" "))
        window = trained.window
        num_tokens = max(1, min(wanted, max(window - len(ids) - 1, window // 2)))
        kept = ids[max(0, len(ids) - (window - num_tokens - 1)) :]
        temperature = float(options.get("temperature") or 0.0)
        sampling = None
        if temperature > 0 and options.get("do_sample", True):
            top_k, top_p = options.get("top_k"), options.get("top_p")
            sampling = Sampling(temperature, int(top_k) if top_k else None, top_p)
        blanks = context[len(context.rstrip(" ")) :]
        return cls([bos, *kept], num_tokens, stop, blanks, sampling)

    def sample(self, trained: Trained, seed: int) -> str:
        """One drawn text."""
        prompt = trained.tokenizer.decode(self.ids[1:])
        options = {"tokens": self.num_tokens, "seed": seed}
        (text,) = trained.generator.texts(prompt, self.sampling, **options)
        text = text.removeprefix(self.blanks)
        ends = [end for end in (text.find(each) for each in self.stop) if end >= 0]
        return text[: min(ends)] if ends else text


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """lm-eval's results of its tasks, groups or tags, its samples included, as values of JSON.

    `include_path` is a folder of task files; lm-eval's own are only read when it does not have all
    of the tasks. `seed` draws demonstrations.

    Raises:
        RecipeError: lm-eval has no such task.
        DataError: it could not run one, mostly because its data is missing.
    """
    import lm_eval

    _quiet_git()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, include_path)
    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
    try:
        results = evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            fewshot_random_seed=seed,
            log_samples=True,
        )
    except GlamError:
        raise
    except Exception as error:  # of many libraries and of task files
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise DataError(
            f"lm-eval could not run {', '.join(tasks)}: {type(error).__name__}: {reason}",
            hint="`glam --debug eval ...` shows the traceback",
        ) from error
    # Digests of the items and prompts of each task, as in lm-eval's own result files.
    names = ("doc_hash", "prompt_hash", "target_hash")
    hashes = {
        task: hash_string("".join(sample[name] for sample in some for name in names))
        for task, some in results["samples"].items()
    }
    results = {**results, "task_hashes": hashes}
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _quiet_git() -> None:
    """Outside of a repository, lm-eval's `git describe` would write an error onto the screen."""
    import lm_eval.evaluator as evaluator

    def commit() -> str | None:
        found = subprocess.run(
            ["git", "describe", "--always"], capture_output=True, text=True, check=False
        )
        return found.stdout.strip() or None

    evaluator.get_git_commit_hash = commit if shutil.which("git") else lambda: None


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    folder = include_path and str(include_path)
    if include_path is not None:
        if not os.path.isdir(include_path):
            raise RecipeError(f"--include-path: no folder {include_path}")
        # Looking through lm-eval's own thousands of task files takes seconds.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    unknown = [each for each in tasks if each not in manager.all_tasks]
    if not unknown:
        return manager
    hint = did_you_mean(unknown[0], manager.all_tasks, "`lm-eval ls tasks` lists them")
    raise RecipeError(f"lm-eval has no task `{unknown[0]}`", hint=hint)


def command_line(model: str) -> None:
    """lm-eval's own command line, which knows `--model glam` then (0.4.13 finds no plug-ins)."""
    import lm_eval.models  # fills the list of models, which it does only while it is empty
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    del lm_eval
    _quiet_git()
    model_registry.register("glam", target=model)
    cli_evaluate()
