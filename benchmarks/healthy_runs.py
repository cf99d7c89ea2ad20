"""Twenty-two healthy runs of different recipes: how near the guard comes to an alarm in each.

    python benchmarks/healthy_runs.py [--steps 200] [--only NAME ...]

Small models on the quick start's text, with everything varied that changes how losses and norms
scatter: experts, depth, rates, optimizers, batches down to one row, rare sources, a change of
weights. For each run: the largest deviations of loss, gradient norm and update norm (an alarm is
`guard.spike_deviations`, 6), steps skipped, warnings, and the last loss. Exits with 1 on an alarm,
also of a router (`guard.routers`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from glamcli.config.load import load_recipe
from glamcli.progress import Silent
from glamcli.train.loop import train
from glamcli.train.metrics import DEVIATIONS

BASE = (
    *("model.num_layers=2", "model.model_dim=64", "model.ffn_dim=128", "model.num_heads=2"),
    *("moe.num_experts=8", "moe.group_tokens=128", "optimizer.learning_rate=0.03"),
    *("batch.rows=4", "batch.row_tokens=128"),
    *("every.heldout_steps=null", "every.checkpoint_steps=null", "every.log_steps=1"),
    *("finish.suite=null", "finish.prompt=null", "heldout.rows=4"),
)
SOURCES = "{0}: {{kind: embedded, path: {0}, min_chars: 200, weight: {1}}}"
MIXTURES = {
    "one.yaml": ({"numpy": 1}, ""),
    "rare.yaml": ({"stdlib": 0.97, "jax": 0.02, "numpy": 0.01}, ""),
    "stages.yaml": ({"stdlib": 1, "jax": 0}, "stages: [{from_step: 100, weights: {jax: 1}}]\n"),
}
RUNS: dict[str, tuple[str, ...]] = {
    "eight experts": (),
    "dense": ("moe=null",),
    "64 experts": ("moe.num_experts=64",),
    "eight layers": ("model.num_layers=8",),
    "rate 0.003": ("optimizer.learning_rate=0.003",),
    "rate 0.1": ("optimizer.learning_rate=0.1",),
    "warm-up": ("optimizer.warmup_steps=50",),
    "momentum": ("optimizer.beta1=0.9",),
    "unclipped": ("optimizer.clip_update_rms=null", "optimizer.learning_rate=0.01"),
    "AdamW": ("optimizer.name=adamw", "optimizer.beta1=0.9", "optimizer.learning_rate=0.002"),
    "AdamW, warm-up": (
        *("optimizer.name=adamw", "optimizer.beta1=0.9", "optimizer.learning_rate=0.005"),
        *("optimizer.warmup_steps=50", "optimizer.weight_decay=0.1"),
    ),
    "two rows": ("batch.rows=2",),
    "one row": ("batch.rows=1",),
    "16 rows in parts": ("batch.rows=16", "batch.accumulate=4"),
    "random second": ("moe.second_policy=random",),
    "drawn second": ("moe.second_policy=sampling",),
    "one choice": ("moe.experts_per_token=1", "moe.capacity_factor=1"),
    "bfloat16, dropless": ("model.activation_dtype=bfloat16", "moe.dispatch=dropless"),
    "whole documents": ("data.packing=whole",),
    "one source": ("data.mixture=./one.yaml",),
    "rare sources, one row": ("data.mixture=./rare.yaml", "batch.rows=1"),
    "weights change": ("data.mixture=./stages.yaml",),
}


class Heard(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


def run(sets: tuple[str, ...], steps: int, folder: Path) -> dict[str, object]:
    """One run, and what its metrics say."""
    steps_set = (f"train.steps={steps}", f"optimizer.hold_steps={max(60, steps // 4)}")
    heard = Heard()
    train(load_recipe("quickstart", [*BASE, *steps_set, *sets]).recipe, folder, heard)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    shutil.rmtree(folder)
    largest = [
        max((line[d] for line in lines if line[d] is not None), default=0) for d in DEVIATIONS
    ]
    return {
        "deviations": [round(each, 2) for each in largest],
        "skipped": lines[-1]["bad_steps_total"],
        "loss": round(lines[-1]["loss"], 3),
        "warnings": heard.warned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=list(RUNS), metavar="NAME")
    arguments = parser.parse_args()
    num_alarms = 0
    with tempfile.TemporaryDirectory() as folder:
        for file, (weights, stages) in MIXTURES.items():
            sources = ", ".join(SOURCES.format(*each) for each in weights.items())
            Path(folder, file).write_text(f"sources: {{{sources}}}\n{stages}heldout_frac: 0.04\n")
        for name in arguments.only:
            sets = tuple(each.replace("=./", f"={folder}/") for each in RUNS[name])
            found = run(sets, arguments.steps, Path(folder, "run"))
            num_alarms += found["skipped"] != 0 or "expert layer" in str(found["warnings"])
            print(json.dumps({"run": name, **found}), flush=True)
    print(f"{num_alarms} of {len(arguments.only)} runs raised an alarm")
    sys.exit(num_alarms > 0)


if __name__ == "__main__":
    main()
