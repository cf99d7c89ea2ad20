"""How the cost of a step grows with chips, experts, depth and rows, from compiled programs.

    python benchmarks/scaling.py             # compiles what results/scaling.jsonl lacks
    python benchmarks/scaling.py chips       # one study: chips, experts, depth or rows
    python benchmarks/scaling.py --table     # prints tables, writes docs/scaling_*.svg
    python benchmarks/scaling.py --formula   # the same studies by arithmetic, in seconds

Weak scaling keeps the work of a chip: rows grow with the slice, and the model stays. Experts grow
with the slice as in GShard, one per chip. One compilation after the other; needs libtpu.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from plans import compiled, read

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "scaling.jsonl"

# Name, recipe, target, settings: 8B/64E over more chips, 1.7B otherwise; 8 rows per chip.
BASE = ("train.steps=1", "moe.dispatch=einsum")


def studies() -> dict[str, list[tuple[str, str, str, tuple[str, ...]]]]:
    chips = [
        (
            f"{n} chips",
            "glam_8b_64e",
            f"v4-{2 * n}",
            (*BASE, "mesh.expert=64", f"mesh.data={n // 64}", f"batch.rows={8 * n}"),
        )
        for n in (64, 256, 1024, 4096)
    ]
    experts = [
        (
            f"{n} experts",
            "glam_1.7b_64e",
            f"v4-{2 * n}",
            # A group needs two tokens per expert, or its four slots are mostly empty.
            (
                *BASE,
                f"moe.num_experts={n}",
                f"moe.group_tokens={max(1024, 2 * n)}",
                f"mesh.expert={n}",
                f"batch.rows={8 * n}",
            ),
        )
        for n in (64, 256, 1024, 2048)
    ]
    experts.insert(
        0,
        (
            "32 experts",
            "glam_1.7b_64e",
            "v4-64",
            (*BASE, "moe.num_experts=32", "mesh.expert=32", "batch.rows=256"),
        ),
    )
    depth = [
        (
            f"{n} layers",
            "glam_1.7b_64e",
            "v4-128",
            (*BASE, f"model.num_layers={n}", "mesh.expert=64", "batch.rows=512"),
        )
        for n in (12, 24, 48)
    ]
    rows = [
        (
            f"{n} rows per chip",
            "glam_1.7b_64e",
            "v4-128",
            (*BASE, "mesh.expert=64", f"batch.rows={64 * n}"),
        )
        for n in (4, 8, 16)
    ]
    return {"chips": chips, "experts": experts, "depth": depth, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", choices=[[], *studies()])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--formula", action="store_true")
    asked = parser.parse_args()
    if asked.formula:
        for study, points in studies().items():
            print(f"\n{study}\n\n{formula_table(points)}")
        return
    known = {(row["study"], row["point"]): row for row in read(RESULTS)}
    for study, points in studies().items():
        for point, recipe, target, sets in points:
            wanted = not asked.studies or study in asked.studies
            if asked.table or not wanted or (study, point) in known:
                continue
            print(f"{study}: {point} ...", flush=True)
            words = [word for each in sets for word in ("--set", each)]
            row = compiled(recipe, "--target", target, *words)
            known[study, point] = {"study": study, "point": point, **row}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in known.values()))
    for study, points in studies().items():
        rows = [known[study, point[0]] for point in points if (study, point[0]) in known]
        if rows:
            print(f"\n{study}\n\n{table(rows)}")
            picture(study, rows)


def table(rows: list[dict]) -> str:
    lines = [
        "| | chips | parameters | GiB per chip | s a step | computing | dispatch and routing "
        "| waiting | all-to-all, GB | utilization | compile, CPU s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['point']} | {row['error'].splitlines()[-1]} |")
            continue
        time = row["estimate"]
        exchanged = sum(c["bytes"] for c in row["collectives"] if c["kind"] == "all-to-all")
        cells = (
            row["point"],
            f"{row['num_chips']:,}",
            f"{row['parameters']['total'] / 1e9:.0f}B",
            f"{row['total_bytes'] / 2**30:.1f}",
            f"{time['step_seconds']:.2f}",
            f"{time['compute_seconds']:.2f}",
            f"{100 * routing_share(row):.0f} %",
            f"{sum(time['exposed_seconds'].values()):.2f}",
            f"{exchanged / 1e9:.1f}",
            f"{100 * row['cost']['utilization_frac']:.1f} %",
            f"{row['compile_cpu_seconds']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def formula_table(points: list[tuple[str, str, str, tuple[str, ...]]]) -> str:
    """The points of a study by `glamcli/plan/formula.py`; nothing is compiled."""
    from glamcli.config.load import load_recipe
    from glamcli.config.sizes import count
    from glamcli.parallel.mesh import mesh_shape
    from glamcli.plan import formula, topology
    from glamcli.plan.memory import state_bytes
    from glamcli.plan.network import Network

    sent = ("dense weights", "experts' weights", "tokens to experts")
    lines = [
        f"| | chips | parameters | GiB per chip | computing, s | {', s | '.join(sent)}, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for point, name, target, sets in points:
        recipe, devices = (
            load_recipe(name, sets).recipe,
            topology.parse(target, topology.load_chips()),
        )
        shape = mesh_shape(recipe.mesh, devices.num_devices)
        network = Network(devices, None, shape)
        found = formula.estimate(recipe, state_bytes(recipe, shape), network)
        cells = (
            point,
            f"{devices.num_chips:,}",
            f"{count(recipe).total / 1e9:.0f}B",
            f"{found.total / 2**30:.1f}",
            f"{found.compute_seconds:.3f}",
            *(f"{found.network.get(what, 0):.3f}" for what in sent),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def routing_share(row: dict) -> float:
    """Share of routing and of the one-hot products of dispatch in the time of a step."""
    time = row["estimate"]
    parts = time["compute_by_part"]
    return (parts.get("router", 0) + parts.get("dispatch", 0)) / time["step_seconds"]


def picture(study: str, rows: list[dict]) -> None:
    """Bars of computing and waiting, as docs/scaling_<study>.svg."""
    rows = [row for row in rows if "error" not in row]
    most = max(row["estimate"]["step_seconds"] for row in rows)
    parts = []
    for index, row in enumerate(rows):
        top, time = 30 + 34 * index, row["estimate"]
        wide = 560 * time["compute_seconds"] / most
        rest = 560 * (time["step_seconds"] - time["compute_seconds"]) / most
        parts.append(
            f'<text x="0" y="{top + 17}" font-size="14">{row["point"]}</text>'
            f'<rect x="150" y="{top}" width="{wide:.1f}" height="24" fill="#4269d0"/>'
            f'<rect x="{150 + wide:.1f}" y="{top}" width="{rest:.1f}" height="24" fill="#ff725c"/>'
            f'<text x="{160 + wide + rest:.1f}" y="{top + 17}" font-size="14">'
            f"{time['step_seconds']:.2f} s</text>"
        )
    head = (
        '<text x="150" y="18" font-size="14">computing (blue), waiting for the network (red)</text>'
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {40 + 34 * len(rows)}" '
        f'font-family="sans-serif">{head}{"".join(parts)}</svg>\n'
    )
    (HERE.parent / "docs" / f"scaling_{study}.svg").write_text(svg)


if __name__ == "__main__":
    main()
