"""How the cost of a step grows with chips, experts, layers and pipelining, from compiled programs.

    python benchmarks/scaling.py             # compiles what results/scaling.jsonl lacks
    python benchmarks/scaling.py chips       # one study: chips, experts, pipeline or layers
    python benchmarks/scaling.py --table     # prints tables, writes docs/scaling_*.svg

Weak scaling keeps the work of a chip: rows grow with the slice, and the model stays. Experts grow
with the slice as in GShard, one per chip. Models have 8 of their layers: layers are scanned, so
more of them repeat what is estimated. Points that are not compiled yet are shown by the planner's
formula alone, and say so. Recipes as they are come from plans.py. Needs libtpu.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from compiled import Kept, markdown
from plans import RESULTS as PLANS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "scaling.jsonl"
COLUMNS = (
    " | >chips | >parameters | >GiB per chip | >s a step | >computing | >routing and dispatch | "
    ">waiting | >all-to-all, GB | >utilization | >compile, CPU s | >by arithmetic: GiB | >s"
)


@dataclass(frozen=True)
class Point:
    """A program to compile: a recipe with settings on a target."""

    name: str
    recipe: str
    target: str
    sets: tuple[str, ...]


def studies() -> dict[str, list[Point]]:
    """Every study's points."""
    base = ("train.steps=1", "moe.dispatch=einsum", "model.num_layers=8")

    def chips(n: int) -> Point:
        mesh = (f"mesh.data={n // 64}", "mesh.expert=64", f"batch.rows={8 * n}")
        return Point(f"{n:,} chips", "glam_8b_64e", f"v4-{2 * n}", (*base, *mesh))

    def experts(n: int) -> Point:
        # A group needs two tokens per expert, or its four slots are mostly empty.
        moe = (f"moe.num_experts={n}", f"moe.group_tokens={max(1024, 2 * n)}")
        mesh = ("mesh.data=1", f"mesh.expert={n}", f"batch.rows={8 * n}")
        return Point(f"{n:,} experts", "glam_1.7b_64e", f"v4-{2 * n}", (*base, *moe, *mesh))

    def layers(n: int) -> Point:
        sets = (*base[:2], f"model.num_layers={n}", "mesh.data=1", "batch.rows=512")
        return Point(f"{n} layers", "glam_1.7b_64e", "v4-128", sets)

    staged = ("mesh.stage=8", "mesh.data=32", "mesh.model=4", "batch.rows=1024")
    pipeline = [
        Point("data 256 x model 4", "glam_137b", "v4-2048", ()),
        Point(
            "stage 8 x data 32 x model 4, 16 microbatches",
            "glam_137b",
            "v4-2048",
            (*staged, "pipeline.microbatches=16"),
        ),
        Point(
            "the same, 32 microbatches, each stage 2 times",
            "glam_137b",
            "v4-2048",
            (*staged, "pipeline.microbatches=32", "pipeline.repeats=2"),
        ),
    ]
    return {
        "chips": [chips(n) for n in (64, 512, 4096)],
        "experts": [experts(n) for n in (32, 128, 512, 2048)],
        "pipeline": pipeline,
        "layers": [layers(n) for n in (8, 24, 48)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", choices=[[], *studies()])
    parser.add_argument("--point", help="only this one")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    kept, plans = Kept(RESULTS), Kept(PLANS).rows
    for study, points in studies().items():
        if asked.studies and study not in asked.studies:
            continue
        for point in points:
            if point.sets and not asked.table and asked.point in (None, point.name):
                kept.compile(point.name, point.recipe, point.sets, point.target)
        known = plans | kept.rows
        rows = [
            (point, known.get(point.name if point.sets else point.recipe, {}), by_formula(point))
            for point in points
        ]
        print(f"\n{study}\n\n{markdown(COLUMNS, (cells(*row) for row in rows))}")
        (HERE.parent / "docs" / f"scaling_{study}.svg").write_text(picture(rows))


@dataclass(frozen=True)
class Formula:
    """What arithmetic alone says."""

    chips: int
    parameters: int
    gib: float
    seconds: float


def by_formula(point: Point) -> Formula:
    """A point by `glamcli/plan/formula.py`; nothing is compiled."""
    from glamcli.config.load import load_recipe
    from glamcli.config.sizes import count
    from glamcli.parallel.mesh import mesh_shape
    from glamcli.plan import formula, topology
    from glamcli.plan.memory import state_bytes
    from glamcli.plan.network import Network

    recipe = load_recipe(point.recipe, point.sets).recipe
    devices = topology.parse(point.target, topology.load_chips())
    shape = mesh_shape(recipe.mesh, devices.num_devices)
    found = formula.estimate(recipe, state_bytes(recipe, shape), Network(devices, None, shape))
    return Formula(devices.num_chips, count(recipe).total, found.total / 2**30, found.seconds)


def cells(point: Point, row: dict, guess: Formula) -> list[str]:
    """A line of a table."""
    head = [point.name, f"{guess.chips:,}", f"{guess.parameters / 1e9:.1f}B"]
    tail = [f"{guess.gib:.1f}", f"{guess.seconds:.3f}"]
    if "estimate" not in row:
        why = row["error"].splitlines()[0] if "error" in row else "not compiled"
        return [*head, why, *["-"] * 7, *tail]
    time = row["estimate"]
    exchanged = sum(c["bytes"] for c in row["collectives"] if c["kind"] == "all-to-all")
    routing = sum(time["compute_by_part"].get(part, 0) for part in ("router", "dispatch"))
    return [
        *head,
        f"{row['total_bytes'] / 2**30:.1f}",
        f"{time['step_seconds']:.3f}",
        f"{time['compute_seconds']:.3f}",
        f"{100 * routing / time['step_seconds']:.0f} %",
        f"{sum(time['exposed_seconds'].values()):.3f}",
        f"{exchanged / 1e9:.1f}",
        f"{100 * row['cost']['utilization_frac']:.1f} %",
        f"{row['compile_cpu_seconds']:.0f}",
        *tail,
    ]


STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1b1e23}.soft{fill:#5c6370}"
    ".c{fill:#4269d0}.r{fill:#efb118}.w{fill:#d1495b}.f{fill:none;stroke:#9498a0;"
    "stroke-dasharray:4 3}@media(prefers-color-scheme:dark){text{fill:#e6e8eb}.soft{fill:#9aa1ad}}"
)
KEY = (("c", "computing"), ("r", "routing and dispatch"), ("w", "waiting for the network"))


def picture(rows: list[tuple[Point, dict, Formula]]) -> str:
    """Bars of a step's seconds: compiled ones filled, and what arithmetic says as an outline."""
    most = max(
        max(row.get("estimate", {}).get("step_seconds", 0), guess.seconds) for _, row, guess in rows
    )
    parts, left = [], 0
    for kind, what in (*KEY, ("f", "by arithmetic alone")):
        parts.append(
            f'<rect x="{left}" y="4" width="14" height="14" class="{kind}"/>'
            f'<text x="{left + 20}" y="16" class="soft">{what}</text>'
        )
        left += 50 + 7 * len(what)
    for index, (point, row, guess) in enumerate(rows):
        top = 36 + 66 * index
        parts.append(f'<text x="0" y="{top + 12}">{point.name}</text>')
        if time := row.get("estimate"):
            routing = sum(time["compute_by_part"].get(part, 0) for part in ("router", "dispatch"))
            waiting = sum(time["exposed_seconds"].values())
            seconds = (("c", time["compute_seconds"] - routing), ("r", routing), ("w", waiting))
            parts.append(_bar(top + 18, seconds, most, time["step_seconds"]))
        parts.append(_bar(top + 38, (("f", guess.seconds),), most, guess.seconds))
    high = 36 + 66 * len(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {high}" width="760">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _bar(top: int, parts: tuple[tuple[str, float], ...], most: float, whole: float) -> str:
    left, found = 0.5, []
    for kind, seconds in parts:
        width = 660 * seconds / most
        found.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="16" class="{kind}"/>'
        )
        left += width
    return f'{"".join(found)}<text x="{left + 8:.1f}" y="{top + 13}">{whole:.2f} s</text>'


if __name__ == "__main__":
    main()
