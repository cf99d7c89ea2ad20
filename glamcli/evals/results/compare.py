"""Two results item by item: wins, and how likely they are by chance.

Only like is compared with like: a task at one number of shots, asked by the same conventions, item
for item with the same text. What differs is named. Models may differ in everything; a note warns
where numbers depend on the tokenizer or on dtypes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glamcli.evals.results.scores import Results, Score
from glamcli.evals.scoring.task_metrics import UNLIKE_RECORDS, Total

_Record = Mapping[str, Any]

# Conditions that may differ: where and how files were named, and how exactly numbers were computed.
# Items and their texts are compared one by one instead of by the digests of all.
_MAY_DIFFER = (
    "preset", "limit", "items_from", "suite_sha256", "task_sha256", "items_sha256",
    "prompts_sha256", "dtype", "window",
)  # fmt: skip
_OF_SHOTS = ("seed", "shots_source", "shots_draw", "shots_separator")


@dataclass(frozen=True)
class _Paired:
    """One metric of one task on the items that both results hold."""

    task: str
    setting: str
    metric: str
    first: float
    second: float
    error: float | None
    """standard error of the mean difference of items; None for metrics that are not such a mean."""
    first_wins: int
    second_wins: int
    ties: int
    p_value: float
    """two-sided sign test: how likely so unequal a number of wins is by chance, ties left out."""


@dataclass(frozen=True)
class _NotCompared:
    """A task that cannot be compared."""

    task: str
    setting: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """The comparison of two results, task by task."""

    paired: tuple[_Paired, ...]
    refused: tuple[_NotCompared, ...]
    notes: tuple[str, ...]


def compare(first: Results, second: Results) -> Comparison:
    """Every task and number of shots that both results hold, with their items."""
    others = {(score.task, score.setting): score for score in second.scores}
    paired: list[_Paired] = []
    refused: list[_NotCompared] = []
    notes: dict[str, None] = {}
    if first.model.get("tokenizer") != second.model.get("tokenizer"):
        notes["the tokenizers differ: per-token scores divide by other counts"] = None
    for score in first.scores:
        where = (score.task, score.setting)
        if where not in others:
            continue
        mine, theirs = _by_item(score.items), _by_item(others[where].items)
        common = [(mine[key], theirs[key]) for key in mine if key in theirs]
        try:
            reason = _unlike(score, others[where], common)
            if reason is not None:
                refused.append(_NotCompared(*where, reason))
                continue
            notes |= dict.fromkeys(_notes(score, others[where], common))
            known = {each.metric for each in others[where].measured}
            metrics = [each.metric for each in score.measured if each.metric in known]
            paired += [_paired(*where, metric, common) for metric in metrics]
        except UNLIKE_RECORDS as error:
            reason = f"the records of its items do not fit its score: {error}"
            refused.append(_NotCompared(*where, reason))
    lonely = {each.task for each in first.scores} ^ {each.task for each in second.scores}
    if lonely:
        notes[f"scored in one of them only: {', '.join(sorted(lonely))}"] = None
    return Comparison(tuple(paired), tuple(refused), tuple(notes))


def _by_item(records: Sequence[_Record]) -> dict[tuple[str, int], _Record]:
    """Records by item; equal items are told apart by their order."""
    seen: Counter[str] = Counter()
    found = {}
    for record in records:
        found[record["key"], seen[record["key"]]] = record
        seen[record["key"]] += 1
    return found


def _unlike(first: Score, second: Score, common: Sequence[tuple[_Record, _Record]]) -> str | None:
    """Why two scores of a task mean different things; None when they mean the same."""
    if first.shots != second.shots:
        return f"`shots` is {first.shots} in the first and {second.shots} in the second"
    ignored = set(_MAY_DIFFER) | (set() if first.shots else set(_OF_SHOTS))
    for name in sorted({*first.conditions, *second.conditions} - ignored):
        mine, other = first.conditions.get(name), second.conditions.get(name)
        if name == "dispatch" and None in (mine, other):
            continue  # a dense model
        if mine != other:
            return f"`{name}` is {_shown(mine)} in the first and {_shown(other)} in the second"
    if not common:
        return "they have no item in common"
    for mine, other in common:
        same_shots = mine["shots_fitted"] == other["shots_fitted"]
        if same_shots and mine["prompt_sha256"] != other["prompt_sha256"]:
            return f"the text of the prompts differs, for example for {mine['place']}"
    return None


def _shown(value: Any) -> str:
    return "not set" if value is None else f"`{value}`"


def _notes(first: Score, second: Score, common: Sequence[tuple[_Record, _Record]]) -> list[str]:
    found = [
        f"`{name}` differs: {_shown(mine)} and {_shown(other)}"
        for name in ("dtype", "window")
        if (mine := first.conditions.get(name)) != (other := second.conditions.get(name))
    ]
    where = f"{first.task} at {first.setting} shots"
    trimmed = sum(mine["shots_fitted"] != other["shots_fitted"] for mine, other in common)
    if trimmed:
        found.append(f"{where}: another number of demonstrations fitted for {trimmed} items")
    left_out = first.num_items + second.num_items - 2 * len(common)
    if left_out:
        found.append(f"{where}: {left_out} items are in one of them only and left out")
    return found


def _paired(
    task: str, setting: str, metric: str, common: Sequence[tuple[_Record, _Record]]
) -> _Paired:
    from scipy.stats import binomtest  # slow to import

    first, second = (Total(metric, records) for records in zip(*common, strict=True))
    differences = [b - a for a, b in zip(first.of_items, second.of_items, strict=True)]
    up, down = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    is_mean = metric in common[0][0]
    return _Paired(
        task=task,
        setting=setting,
        metric=metric,
        first=first.value,
        second=second.value,
        error=Total(metric, [{metric: each} for each in differences]).stderr if is_mean else None,
        first_wins=down,
        second_wins=up,
        ties=len(common) - up - down,
        p_value=float(binomtest(up, up + down).pvalue) if up + down else 1.0,
    )
