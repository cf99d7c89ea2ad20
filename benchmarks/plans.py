"""Every size of the paper compiled for its recommended target: memory, collectives, time, cost.

    python benchmarks/plans.py                   # compiles what results/plans.jsonl lacks
    python benchmarks/plans.py glam_8b --again   # compiles these anew
    python benchmarks/plans.py --table           # prints the table of what is there

Needs libtpu, minutes per recipe on two cores, and no TPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compiled import Kept, markdown, recipe_hash

from glamcli.config.load import load_recipe, shipped

RESULTS = Path(__file__).parent / "results" / "plans.jsonl"
COLUMNS = (
    "recipe | target | mesh | >GiB per chip | >headroom | collectives, GB a step | >s a step | "
    ">tokens/s | >utilization | >days | >compile, CPU s | >peak GiB"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    names = asked.recipes or [n for n in shipped("recipes") if load_recipe(n).recipe.plan.target]
    kept = Kept(RESULTS)
    for name in names if not asked.table else ():
        kept.compile(name, name, again=asked.again)
    rows = [kept.rows[name] for name in names if name in kept.rows]
    print(markdown(COLUMNS, map(cells, rows)))


def cells(row: dict) -> list[str]:
    """A line of the table; `*` marks a recipe that has changed since it was compiled."""
    changed = "" if row["recipe_hash"] == recipe_hash(row["recipe"]) else "*"
    if "error" in row:
        return [row["recipe"], "", "", "", "", row["error"].splitlines()[-1], *[""] * 6]
    cost = row["cost"]
    return [
        row["recipe"] + changed,
        row["target"],
        " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1),
        f"{row['total_bytes'] / 2**30:.1f}",
        f"{100 * row['headroom_frac']:.0f} %",
        kinds(row["collectives"]),
        f"{cost['step_seconds']:.2f}",
        f"{cost['tokens_per_second']:,.0f}",
        f"{100 * cost['utilization_frac']:.1f} %",
        f"{cost['days']:,.1f}",
        f"{row['compile_cpu_seconds']:.0f}",
        f"{row['peak_gib']:.1f}",
    ]


def kinds(collectives: list[dict]) -> str:
    """Gigabytes by kind, over all axes."""
    sums: dict[str, float] = {}
    for each in collectives:
        sums[each["kind"]] = sums.get(each["kind"], 0) + each["bytes"] / 1e9
    return ", ".join(f"{kind} {size:.1f}" for kind, size in sums.items() if size >= 0.05)


if __name__ == "__main__":
    main()
