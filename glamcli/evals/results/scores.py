"""Scores with everything needed to know what they mean (`store.py` writes and reads them)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from glamcli.errors import GlamError
from glamcli.train.metrics import FAILED_TASKS, STDERR

RESULTS_FORMAT = 2
"""2 since scores count ties and records of items hold classes; 1 is still read."""


@dataclass(frozen=True)
class Reported:
    """A published score of another model."""

    model: str
    value: float
    """as printed there: in percent, a perplexity as it is."""
    confirmed: bool
    """false: from memory or second hand, not seen in the paper itself."""


@dataclass(frozen=True)
class Measured:
    """One metric of one task: 0 to 1 (perplexity: 1 and more), with its standard error and what it
    is compared with."""

    metric: str
    value: float
    stderr: float | None
    baselines: Mapping[str, float | None]
    """`random`, `position`, `majority`; None where it has no meaning."""
    interval: tuple[float, float] | None = None
    """95 % bootstrap, for F1 and metrics that are not a mean over items."""
    published: tuple[Reported, ...] = ()
    """by other models, at the same number of shots."""


@dataclass(frozen=True)
class Subset:
    """The items in which a field has one value."""

    field: str
    value: str
    num_items: int
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Score:
    """One task at one number of shots."""

    task: str
    shots: int
    """demonstrations asked for."""
    setting: str
    """`0`, `1`, ... or `few`: what asked for them."""
    measured: tuple[Measured, ...]
    """the task's own score first."""
    num_items: int
    shots_fitted: float
    """mean number of demonstrations that fitted into the window."""
    num_trimmed: int
    """items in front of which fewer fitted than were asked for."""
    num_cut: int
    """items whose own beginning was cut."""
    skipped: tuple[str, ...]
    """items that could not be scored, with the reason."""
    conditions: Mapping[str, Any]
    """conventions of the task, hashes, seed, dtype: what must agree for scores to be compared."""
    subsets: tuple[Subset, ...]
    items: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    num_tied: int = 0
    """items whose best options tie exactly: each of k counts 1/k."""
    num_equal: int = 0
    """items two of whose options are the same text behind the same context."""


@dataclass(frozen=True)
class Failure:
    """A task that could not be scored."""

    task: str
    setting: str | None
    """None when it could not be scored at any number of shots."""
    error: GlamError


@dataclass(frozen=True)
class Scored:
    """One scored text of an explained item: its tokens with their log-probabilities."""

    context: str
    text: str
    tokens: tuple[tuple[str, float], ...]
    score: float
    """as compared: by the task's scorer."""
    greedy: bool


@dataclass(frozen=True)
class Explanation:
    """Exactly what was asked and scored for one item."""

    task: str
    shots: int
    index: int
    place: str
    prompt_tokens: int
    shots_fitted: int
    num_cut: int
    scored: tuple[Scored, ...]
    chosen: str
    wanted: tuple[str, ...]
    correct: Mapping[str, float]


@dataclass(frozen=True)
class Average:
    """Arithmetic mean of task scores at one number of shots."""

    name: str
    setting: str
    value: float | None
    """0 to 1, over the entries that were scored; None when none was."""
    num_entries: int
    """entries that belong to it."""
    missing: tuple[str, ...]
    """those that were not scored: with any, the value cannot be compared with a published one."""
    published: tuple[Reported, ...] = ()


@dataclass(frozen=True)
class Results:
    """A suite on a model."""

    suite: str
    model: Mapping[str, Any]
    scores: tuple[Score, ...]
    failures: tuple[Failure, ...]
    explanations: tuple[Explanation, ...] = ()
    averages: tuple[Average, ...] = ()
    averaging: str = ""
    """the rule of the averages, in words."""
    preset: str = "glam"
    shots: tuple[str, ...] | None = None
    """what was asked for: `0`, `1`, ..., `few`; None: those of the suite."""
    seed: int = 0
    limit: int | None = None

    def curves(self) -> dict[str, float]:
        """Numbers by name for the metrics of a run, `eval/TASK/METRIC/SETTING_shots`, their
        standard errors (`..._stderr`), and how many tasks failed."""
        found = {FAILED_TASKS: float(len({each.task for each in self.failures}))}
        for score in self.scores:
            for each in score.measured:
                name = f"eval/{score.task}/{each.metric}/{score.setting}_shots"
                found[name] = each.value
                if each.stderr is not None:
                    found[name + STDERR] = each.stderr
        for each in self.averages:
            if each.value is not None and not each.missing:
                found[f"eval/{each.name}/{each.setting}_shots"] = each.value
        return found

    def to_json(self) -> dict[str, Any]:
        """For JSON: everything but the items."""
        scores = [{k: v for k, v in asdict(each).items() if k != "items"} for each in self.scores]
        names = ("suite", "preset", "shots", "seed", "limit")
        return {
            "format": RESULTS_FORMAT,
            **{name: getattr(self, name) for name in names},
            "model": dict(self.model),
            "averages": [asdict(each) for each in self.averages],
            "averaging": self.averaging,
            "scores": scores,
            "failures": [
                {
                    "task": each.task,
                    "setting": each.setting,
                    "error": each.error.what,
                    "hint": each.error.hint,
                }
                for each in self.failures
            ],
        }


def file_name(
    asked: str,
    model: Mapping[str, Any],
    *,
    preset: str = "glam",
    shots: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> str:
    """A name for results, without a suffix: what was asked, every convention that is not the
    usual one, and the step of the model."""
    dispatch, step = model.get("dispatch"), model.get("step")
    parts = [
        asked,
        *([preset] if preset != "glam" else []),
        *(["shots" + ",".join(shots)] if shots is not None else []),
        *([f"limit{limit}"] if limit is not None else []),
        *([f"seed{seed}"] if seed else []),
        *([dispatch] if dispatch not in (None, "dropless") else []),
        *([f"step{step}"] if step is not None else []),
    ]
    return "-".join(parts)
