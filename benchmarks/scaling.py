"""How the cost of a step grows with chips, experts, layers, rows and stages, compiled.

    python benchmarks/scaling.py             # compiles what results/scaling.jsonl lacks
    python benchmarks/scaling.py chips       # one study
    python benchmarks/scaling.py --table     # prints tables, writes docs/scaling_*.svg

Weak scaling keeps the work of a chip: rows grow with the slice, and the model stays. Experts grow
with the slice as in GShard, one per chip. Models have 8 of their layers: layers are scanned, so
more of them repeat what is estimated. Points that are not compiled yet are shown by the planner's
formula alone, and say so. Recipes as they are come from plans.py. Needs libtpu, minutes per point.
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
    " | >chips | >parameters | >GiB per chip | >s a step | >layers | >of that routing | >softmax | "
    ">waiting | >all-to-all, GB | >utilization | >compile, CPU s | >by arithmetic: GiB | >s"
)


@dataclass(frozen=True)
class Point:
    """A program to compile: a recipe with settings on a target."""

    name: str
    """what varies in its study."""
    recipe: str
    target: str
    sets: tuple[str, ...]

    @property
    def program(self) -> str:
        """The same in all studies that share this point; a recipe as it is has its name alone."""
        return " ".join((self.recipe, self.target, *self.sets)) if self.sets else self.recipe


def studies() -> dict[str, list[Point]]:
    """Every study's points; most vary one thing of the same program, 64 experts on 64 chips."""

    def moe(name: str, experts: int = 64, layers: int = 8, rows: int = 8, data: int = 1) -> Point:
        """The 1.7B shape with an expert (and `rows` rows) on every chip, `data` times over."""
        chips = experts * data
        sets = (
            f"model.num_layers={layers}",
            f"moe.num_experts={experts}",
            # A group needs two tokens per expert, or its four slots are mostly empty.
            f"moe.group_tokens={max(1024, 2 * experts)}",
            f"mesh.data={data}",
            f"mesh.expert={experts}",
            f"batch.rows={rows * chips}",
        )
        if data > 1:  # 2,048 of width do not divide over 4,096 chips
            sets = (*sets, "mesh.rules.embed=[expert]")
        return Point(name, "glam_1.7b_64e", f"v4-{2 * chips}", sets)

    def dense(name: str, *sets: str) -> Point:
        return Point(name, "glam_137b", "v4-2048", sets)

    return {
        "chips": [moe(f"{64 * n:,} chips", data=n) for n in (1, 8, 64)],
        "experts": [moe(f"{n:,} experts", n) for n in (32, 64, 128, 512, 2048)],
        "layers": [
            moe("8 layers"),
            Point("24 layers (the recipe: data 2 x expert 64)", "glam_1.7b_64e", "v4-256", ()),
            moe("48 layers", layers=48),
        ],
        "rows": [moe(f"{n} rows per chip", rows=n) for n in (4, 8, 16)],
        "pipeline": [
            dense("data 256 x model 4"),
            dense(
                "8 stages x data 16 x model 8, 32 microbatches",
                *("mesh.stage=8", "mesh.data=16", "mesh.model=8"),
                "pipeline.microbatches=32",
            ),
            dense(
                "8 stages x data 16 x model 8, 16 microbatches, 2 repeats",
                *("mesh.stage=8", "mesh.data=16", "mesh.model=8"),
                *("pipeline.microbatches=16", "pipeline.repeats=2"),
            ),
            dense(
                "4 stages x data 16 x model 16, 32 microbatches",
                *("mesh.stage=4", "mesh.data=16", "mesh.model=16"),
                "pipeline.microbatches=32",
            ),
        ],
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
                kept.compile(point.program, point.recipe, point.sets, point.target)
        known = plans | kept.rows
        rows = [(point, known.get(point.program, {}), by_formula(point)) for point in points]
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
    from glamcli.config.chips import load_chips
    from glamcli.config.load import load_recipe
    from glamcli.config.sizes import count
    from glamcli.parallel.mesh import mesh_shape
    from glamcli.plan import formula, topology
    from glamcli.plan.memory import state_bytes
    from glamcli.plan.network import Network

    recipe = load_recipe(point.recipe, point.sets).recipe
    devices = topology.parse_target(point.target, load_chips())
    shape = mesh_shape(recipe.mesh, devices.num_devices)
    found = formula.estimate(recipe, state_bytes(recipe, shape), Network(devices, None, shape))
    return Formula(devices.num_chips, count(recipe).total, found.total / 2**30, found.seconds)


def cells(point: Point, row: dict, guess: Formula) -> list[str]:
    """A line of a table."""
    head = [point.name, f"{guess.chips:,}", f"{guess.parameters / 1e9:.1f}B"]
    tail = [f"{guess.gib:.1f}", f"{guess.seconds:.2f}"]
    if "estimate" not in row:
        why = row["error"].splitlines()[0] if "error" in row else "not compiled"
        return [*head, why, *["-"] * 8, *tail]
    exchanged = sum(c["bytes"] for c in row["collectives"] if c["kind"] == "all-to-all")
    layers, routing, softmax, waiting = seconds(row)
    return [
        *head,
        f"{row['total_bytes'] / 2**30:.1f}",
        f"{row['estimate']['step_seconds']:.2f}",
        f"{layers + routing:.2f}",
        f"{100 * routing / (layers + routing):.1f} %",
        f"{softmax:.2f}",
        f"{waiting:.2f}",
        f"{exchanged / 1e9:.1f}",
        f"{100 * row['cost']['utilization_frac']:.1f} %",
        f"{row['compile_cpu_seconds']:.0f}",
        *tail,
    ]


def seconds(row: dict) -> tuple[float, float, float, float]:
    """A step's time in layers without routing, in routing and the one-hot products of dispatch, in
    softmax, embedding and optimizer, and waiting for the network."""
    time = row["estimate"]
    part = time["compute_by_part"].get
    routing = part("router", 0) + part("dispatch", 0)
    outside = part("softmax", 0) + part("embed", 0) + part("optimizer", 0)
    layers = time["compute_seconds"] - routing - outside
    return layers, routing, outside, sum(time["exposed_seconds"].values())


STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1b1e23}.soft{fill:#5c6370}.l{fill:#4269d0}"
    ".r{fill:#efb118}.s{fill:#97bbf5}.w{fill:#d1495b}"
    ".f{fill:none;stroke:#9498a0;stroke-dasharray:4 3}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e8eb}.soft{fill:#9aa1ad}}"
)
KEY = (
    ("l", "layers"),
    ("r", "routing and dispatch"),
    ("s", "softmax, update"),
    ("w", "waiting"),
    ("f", "by arithmetic"),
)


def picture(rows: list[tuple[Point, dict, Formula]]) -> str:
    """Bars of a step's seconds: compiled ones filled, and what arithmetic says as an outline."""
    known = [row["estimate"]["step_seconds"] for _, row, _ in rows if "estimate" in row]
    most = max(*known, *(guess.seconds for *_, guess in rows))
    parts, left = [], 0
    for kind, what in KEY:
        parts.append(
            f'<rect x="{left + 0.5}" y="4.5" width="13" height="13" class="{kind}"/>'
            f'<text x="{left + 20}" y="16" class="soft">{what}</text>'
        )
        left += 44 + 7 * len(what)
    top = 36
    for point, row, guess in rows:
        parts.append(f'<text x="0" y="{top + 12}">{point.name}</text>')
        if "estimate" in row:
            parts.append(_bar(top + 18, "lrsw", seconds(row), most))
            top += 20
        parts.append(_bar(top + 18, "f", (guess.seconds,), most))
        top += 46
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {top}" width="760">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _bar(top: int, kinds: str, parts: tuple[float, ...], most: float) -> str:
    """Parts of a step one after the other, and its seconds at the end."""
    left, found = 0.5, []
    for kind, part in zip(kinds, parts, strict=True):
        width = 660 * part / most
        found.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="16" class="{kind}"/>'
        )
        left += width
    text = f'<text x="{left + 8:.1f}" y="{top + 13}">{sum(parts):.2f} s</text>'
    return "".join(found) + text


if __name__ == "__main__":
    main()
