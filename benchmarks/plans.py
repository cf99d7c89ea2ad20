"""Every size of the paper compiled for its recommended target: memory, collectives, time, cost.

    python benchmarks/plans.py                   # compiles what results/plans.jsonl lacks
    python benchmarks/plans.py glam_8b --again   # compiles these anew
    python benchmarks/plans.py --table           # prints the table of what is there

One recipe after the other, each in a process of its own so that its peak memory is known. Needs
libtpu, minutes per recipe on two cores, and no TPU.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path

from glamcli.config.load import load_recipe, shipped

RESULTS = Path(__file__).parent / "results" / "plans.jsonl"
GLAM = (sys.executable, "-c", "from glamcli.cli.main import run; run()")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    names = asked.recipes or [n for n in shipped("recipes") if load_recipe(n).recipe.plan.target]
    known = {row["recipe"]: row for row in read(RESULTS)}
    for name in names if not asked.table else ():
        same = known.get(name, {}).get("recipe_hash") == recipe_hash(name)
        if same and not asked.again:
            continue
        print(f"{name} ...", flush=True)
        known[name] = {"recipe_hash": recipe_hash(name), **compiled(name)}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in known.values()))
    print(table([known[name] for name in names if name in known]))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def recipe_hash(name: str) -> str:
    text = load_recipe(name).recipe.model_dump_json(exclude={"about", "notes"})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def compiled(name: str, *words: str) -> dict:
    """What `glam plan` says, and the peak memory of its process so far in this script."""
    command = [*GLAM, "plan", name, "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    plan = next((row for row in found if row["event"] == "plan"), None)
    if plan is None:
        return {"recipe": name, "words": words, "error": done.stderr.strip()}
    plan.pop("arrays")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"date": str(datetime.date.today()), "words": words, "peak_gib": round(peak, 2), **plan}


def table(rows: list[dict]) -> str:
    """Rows of markdown."""
    lines = [
        "| recipe | target | mesh | GiB per chip | headroom | collectives, GB a step | s a step | "
        "tokens/s | utilization | days | compile, CPU s | peak GiB |",
        "|---|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(
                f"| {row['recipe']} | | | | | {row['error'].splitlines()[-1]} | | | | | | |"
            )
            continue
        mesh = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1)
        cost = row["cost"]
        cells = (
            row["recipe"],
            row["target"],
            mesh,
            f"{row['total_bytes'] / 2**30:.1f}",
            f"{100 * row['headroom_frac']:.0f} %",
            kinds(row["collectives"]),
            f"{cost['step_seconds']:.2f}",
            f"{cost['tokens_per_second']:,.0f}",
            f"{100 * cost['utilization_frac']:.1f} %",
            f"{cost['days']:,.1f}",
            f"{row['compile_cpu_seconds']:.0f}",
            f"{row['peak_gib']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kinds(collectives: list[dict]) -> str:
    """Gigabytes by kind, over all axes."""
    sums: dict[str, float] = {}
    for each in collectives:
        sums[each["kind"]] = sums.get(each["kind"], 0) + each["bytes"] / 1e9
    return ", ".join(f"{kind} {size:.1f}" for kind, size in sums.items() if size >= 0.05)


if __name__ == "__main__":
    main()
