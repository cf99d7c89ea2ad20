"""A run folder as one value for the page. What is missing or damaged is said, and never an error,
but a folder without any number of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from glamcli.config.load import leaves, load_recipe
from glamcli.config.origins import noted_origins, short_origins
from glamcli.config.schema import Recipe
from glamcli.config.settings import Settings
from glamcli.errors import CheckpointError, GlamError
from glamcli.report import events, mixture, scores
from glamcli.report.curves import LOAD, MAX_STEP, Curves, Loads
from glamcli.report.events import Event, Noticed
from glamcli.report.mixture import ReadRows
from glamcli.report.scores import ScoreCurve
from glamcli.train.identity import by_dotted_key
from glamcli.train.metric_files import as_number, metric_lines, run_seconds
from glamcli.train.rewind import Rewind, rewinds
from glamcli.train.times import TIME_KINDS
from glamcli.untrusted import open_regular, parse_json, read_file

METRICS = "metrics.jsonl"
BY_LAYER = "_by_layer"
MAX_SECONDS = 1e10
"""of a run; where there are more, a clock was wrong."""

_Read = TypeVar("_Read")


@dataclass
class ReportRun:
    """What is known of a run."""

    name: str
    folder: Path
    curves: Curves = field(default_factory=Curves)
    loads: Loads = field(default_factory=Loads)
    step: int = 0
    """the newest in its metrics."""
    is_loss_finite: bool = True
    """at the newest step that has one."""
    passed: float | None = None
    """seconds from its start to its newest line, by the clock."""
    tokens_per_step: float | None = None
    by_layer: dict[str, list[float | None]] = field(default_factory=dict)
    """the newest numbers of the routers by expert layer."""
    recipe: Recipe | None = None
    origins: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """the recipe's values by dotted key."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """`run.json`: versions and devices."""
    events: list[Event] = field(default_factory=list)
    planned: dict[str, float] = field(default_factory=dict)
    """share of every source over the whole run."""
    rows: ReadRows | None = None
    scores: list[ScoreCurve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what is missing, damaged or left out."""

    @property
    def seconds(self) -> dict[str, float]:
        """The run's time so far by kind; empty where its metrics do not say."""
        found = {kind: self.curves.latest.get(f"seconds/{kind}") for kind in TIME_KINDS}
        return {
            k: each for k, each in found.items() if each is not None and 0 <= each < MAX_SECONDS
        }

    def try_to(self, what: str, read: Callable[[], _Read]) -> _Read | None:
        """What `read` returns; None, with a note, where that is not possible."""
        try:
            return read()
        except OSError as error:
            name = f"{Path(error.filename).name}: " if error.filename else ""
            self.notes.append(f"{what}: {name}{_reason(error)}")
        except GlamError as error:
            self.notes.append(f"{what}: {error}")
        return None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def read_run(run_dir: Path, name: str) -> ReportRun:
    """Everything that the page shows of a run, also of one that is training.

    Raises: CheckpointError when the folder has no number of a run.
    """
    run = ReportRun(name, run_dir)
    records = run.try_to("rewinds are left out", lambda: rewinds(run_dir)) or []
    try:
        noticed = _read_metrics(run, records)
    except OSError as error:
        raise CheckpointError(
            f"{run_dir} is no run folder: {METRICS}: {_reason(error)}",
            hint="give the folder of a run, such as runs/quickstart",
        ) from error
    if not run.step:
        raise CheckpointError(
            f"{run_dir / METRICS} has no numbers yet",
            hint="a run writes them from its first step on",
        )
    run.about = run.try_to("versions and devices are left out", lambda: _about(run_dir)) or {}
    _read_recipe(run)
    found = noticed.events + events.went_back(records)
    for what, read in (
        ("saved steps are left out", events.saves),
        ("failures are left out", events.failed),
    ):
        found += run.try_to(what, lambda read=read: read(run_dir)) or []
    if (recipe := run.recipe) is not None:
        planned = run.try_to("planned shares are left out", lambda: mixture.planned_shares(recipe))
        run.planned = planned or {}
        rows = recipe.batch.rows
        run.rows = run.try_to(
            "realised shares are left out", lambda: mixture.rows_read(run_dir, rows)
        )
        found += events.stages(run.rows.stages if run.rows else [])
    run.events, left_out = events.newest_events(found)
    if left_out := left_out + noticed.num_left_out:
        run.notes.append(f"{left_out:,} older events are left out")
    run.scores, wrong = scores.score_curves(run_dir, run.curves)
    run.notes += [f"scores are left out: {each}" for each in wrong]
    return run


def _read_metrics(run: ReportRun, records: Sequence[Rewind]) -> Noticed:
    """Fills curves and loads; raises OSError when there is no such file."""
    noticed, num_damaged, began = Noticed(records), 0, None
    routers: Mapping[str, Any] = {}
    with open_regular(run.folder / METRICS) as file:
        for line, values in metric_lines(file):
            if values is None or not 0 < values["step"] < MAX_STEP:
                num_damaged += line.endswith(b"\n")  # the last may be half written
                continue
            step = values["step"]
            run.step = max(run.step, step)
            tokens = as_number(values.get("tokens_seen"))
            run.tokens_per_step = tokens / step if tokens else run.tokens_per_step
            if (spent := run_seconds(values)) and (at := as_number(values.get("unix_seconds"))):
                began = at - spent if began is None else began
                run.passed = at - began
            if "loss" in values:
                run.is_loss_finite = values["loss"] is not None
            run.curves.add(step, values)
            noticed.line(step, values)
            if LOAD in values:
                run.loads.add(step, values[LOAD])
                routers = values
    run.by_layer = {
        name.removesuffix(BY_LAYER): [as_number(each) for each in value]
        for name, value in routers.items()
        if name.endswith(BY_LAYER) and name != LOAD and isinstance(value, list)
    }
    if num_damaged:
        lines = "line is" if num_damaged == 1 else "lines are"
        run.notes.append(f"{num_damaged:,} {lines} damaged and left out")
    if run.curves.num_left_out:
        run.notes.append(f"{run.curves.num_left_out:,} numbers have too many names: left out")
    if run.loads.num_left_out:
        run.notes.append(
            f"{run.loads.num_left_out:,} loads of experts are of another shape: left out"
        )
    return noticed


def _about(run_dir: Path) -> Mapping[str, Any]:
    try:
        found = parse_json(read_file(run_dir / "run.json"))
    except ValueError as error:
        raise GlamError(f"run.json: {error}") from None
    return found if isinstance(found, dict) else {}


def _read_recipe(run: ReportRun) -> None:
    """The recipe that the run keeps, or as much of it as `run.json` has."""
    loaded = run.try_to(
        "the recipe is left out", lambda: load_recipe(run.folder / "recipe.yaml", check=False)
    )
    if loaded is None:
        kept = run.about.get("recipe")
        run.settings = by_dotted_key(kept) if isinstance(kept, dict) else {}
        return
    run.recipe, run.settings = loaded.recipe, dict(leaves(loaded.recipe))
    noted = noted_origins(run.about, loaded.recipe)
    short = short_origins(noted.values())
    run.origins = dict(_origins(loaded.recipe))
    run.origins |= {key: short[origin] for key, origin in noted.items()}


def _origins(settings: Settings, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`default` or `recipe` for every setting by dotted key, for a run that has noted no more."""
    for name, about in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _origins(value, f"{prefix}{name}.")
        else:
            known = about.get_default(call_default_factory=True)
            yield prefix + name, "default" if value == known else "recipe"
