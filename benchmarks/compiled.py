"""What plans.py and scaling.py share: rows of results that `glam plan` compiled, kept in a file.

Every program is compiled in a process of its own, one after the other, so that its peak memory is
known; rows are written as they come, and a program that is there already is not compiled again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from glamcli.config.load import load_recipe

GLAM = (sys.executable, "-c", "from glamcli.cli.main import run; run()")


class Kept:
    """The rows of one file, by the name of what was compiled."""

    def __init__(self, path: Path):
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict] = {row["point"]: row for row in map(json.loads, lines)}

    def compile(
        self, point: str, recipe: str, sets: tuple[str, ...] = (), target: str = "", again=False
    ) -> None:
        """Compiles the recipe unless this very one is there, and keeps what the plan says."""
        about = {"point": point, "recipe_hash": recipe_hash(recipe, sets), "sets": sets}
        known = self.rows.get(point, {})
        if known.get("recipe_hash") == about["recipe_hash"] and not again:
            return
        print(f"{point} ...", flush=True)
        words = [word for each in sets for word in ("--set", each)]
        words += ["--target", target] if target else []
        self.rows[point] = {**about, **_plan(recipe, words)}
        self._path.parent.mkdir(exist_ok=True)
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))


def recipe_hash(name: str, sets: tuple[str, ...] = ()) -> str:
    """Twelve digits that change with anything in a recipe but its prose."""
    text = load_recipe(name, sets).recipe.model_dump_json(exclude={"about", "notes"})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plan(recipe: str, words: list[str]) -> dict:
    """What `glam plan` says, and the largest memory of this script's processes so far."""
    anew = ["--set", "runtime.compile_cache=false"]  # whose seconds and memory are told
    command = [*GLAM, "plan", recipe, "--json", *anew, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    plan = next((row for row in found if row["event"] == "plan"), None)
    if plan is None:
        return {"recipe": recipe, "error": done.stderr.strip()}
    plan.pop("arrays")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"date": str(datetime.date.today()), "peak_gib": round(peak, 2), **plan}


def markdown(columns: str, rows: Iterable[Iterable[str]]) -> str:
    """A table; columns are parted by `|`, and those that begin with `>` are numbers."""
    names = [name.strip() for name in columns.split("|")]
    lines = [
        f"| {' | '.join(name.removeprefix('>') for name in names)} |",
        f"|{'|'.join('--:' if name.startswith('>') else '---' for name in names)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)
