"""Times an evaluation beside lm-eval driving a Hugging Face model of the same active size.

    python benchmarks/eval_speed.py --rival RIVAL_ENV/bin/python      # see rival_lm_eval.py
    python benchmarks/eval_speed.py                                   # glam alone

The model of `train_step.py` with random weights, float32, window 1,024, dropless. Both sides read
the same items of whole words (one token each) from the same JSONL files: four kinds of work, from
short questions to generated answers. Both are timed from the items to the scores, in turns;
reported are the least wall-clock and processor seconds of all turns, per scored (or generated)
token, and glam's first turn, which compiles. The rival runs in several batch sizes. Both have huge
pages. On a machine with other work compare processor seconds with `--threads 1`: threads that
wait for each other spin.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glamcli import hugepages, libtpu
from glamcli.config import schema

VOCAB, WINDOW = 8192, 1024
# name: items, tokens of own context, tokens of a beginning (shared: the same for all items),
# options, tokens of each, generated tokens
WORK = {
    "short": (100, 24, 0, False, 2, 12, 0),
    "few_shot": (16, 24, 300, False, 4, 6, 0),
    "fixed_shots": (32, 24, 300, True, 4, 6, 0),
    "generate": (32, 64, 0, False, 0, 0, 16),
}
OURS = 'data: {path: NAME.jsonl}\nprompt: "{context}"\n'
CHOICE = "options: options\nlabel: label\nscorer: sum\n"
FREE = "answers: options\nscorer: generate\nmetrics: [em]\nbeam: 1\nmax_tokens: NUM\nstop: []\n"


class Words:
    """A tokenizer of whole words `w3`, `w4`, ...: one token each."""

    kind, vocab_size, fingerprint = "words", VOCAB, "words"
    pad_id, eos_id, bos_id = 0, 1, 2

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{each}" for each in ids if each > 2)

    def piece(self, token_id: int) -> str:
        return f"w{token_id}"


def write(name: str, folder: Path) -> int:
    """Items and our task file; the number of scored or generated tokens."""
    items, own, beginning, shared, options, each, new = WORK[name]
    rng = random.Random(name)

    def some(count: int) -> str:
        return " ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(count))

    common = some(beginning)
    records = []
    for _ in range(items):
        before = common if shared else some(beginning)
        found = [some(each) for _ in range(options)] or ["w3"]
        context = f"{before} {some(own)}".strip()
        records.append({"context": context, "options": found, "label": 0})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text(lines)
    kind = FREE.replace("NUM", str(new)) if new else CHOICE
    (folder / f"{name}.yaml").write_text(OURS.replace("NAME", name) + kind)
    return items * (new or options * each)


def workload(num_experts: int) -> schema.Recipe:
    """The model of `train_step.py`, with a window of 1,024."""
    model = schema.Model(
        num_layers=4,
        model_dim=256,
        ffn_dim=1024,
        num_heads=8,
        head_dim=32,
        vocab_size=VOCAB,
        activation_dtype="float32",
    )
    moe = schema.Moe(num_experts=num_experts, group_tokens=2048)
    batch, data = schema.Batch(rows=1, row_tokens=WINDOW), schema.Data(mixture="none")
    return schema.Recipe(model=model, moe=moe, batch=batch, train=schema.Train(steps=1), data=data)


def glam(recipe: schema.Recipe, folder: Path) -> Callable[[str], dict[str, float]]:
    """Evaluates one workload with a model that is kept."""
    libtpu.quiet()
    import jax

    from glamcli.evals.run import evaluate
    from glamcli.evals.tasks.suites import load_suite
    from glamcli.model.decoder import Decoder
    from glamcli.progress import Silent
    from glamcli.trained import Trained

    decoder = Decoder(recipe.model, recipe.moe)
    params = jax.jit(decoder.init)(jax.random.key(0))
    tokenizer: Any = Words()
    trained = Trained(recipe, decoder, params, tokenizer)

    def run(name: str) -> dict[str, float]:
        suite = load_suite(str(folder / f"{name}.yaml"))
        start, cpu = time.perf_counter(), time.process_time()
        results = evaluate(trained, suite, shots=[0], progress=Silent())
        assert not results.failures, results.failures
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}

    return run


class Rival:
    """The other process; it answers one line per workload."""

    def __init__(self, python: str, setting: dict[str, Any]):
        script = Path(__file__).with_name("rival_lm_eval.py")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (mostly progress bars)
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
        )
        self.versions = self._ask(setting)["versions"]

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self._said.seek(0)
            sys.exit(f"the rival ended:\n{self._said.read()[-4000:]}")

    def run(self, name: str, folder: Path, batch_size: int) -> dict[str, float]:
        path = str(folder / f"{name}.jsonl")
        new = WORK[name][-1]
        return self._ask({"name": name, "path": path, "new_tokens": new, "batch_size": batch_size})


def least(turns: list[dict[str, float]]) -> dict[str, float]:
    return {key: min(turn[key] for turn in turns) for key in ("seconds", "cpu_seconds")}


def measure(options: argparse.Namespace, num_experts: int, folder: Path) -> None:
    ours = glam(workload(num_experts), folder)
    rival = None
    if options.rival:
        setting = {
            "vocab_size": VOCAB,
            "window": WINDOW,
            "num_experts": num_experts,
            "batch_sizes": options.batch_sizes,
            "threads": options.threads,
        }
        rival = Rival(options.rival, setting)
        print(f"rival: {rival.versions}", file=sys.stderr)
    for name in options.work:
        num_tokens = write(name, folder)
        first = ours(name)
        turns: dict[str | int, list[dict[str, float]]] = {"glam": []}
        for _ in range(options.turns):
            turns["glam"].append(ours(name))
            for size in options.batch_sizes if rival else ():
                turns.setdefault(size, []).append(rival.run(name, folder, size))
        best = {who: least(each) for who, each in turns.items()}
        rows = [("glam", best.pop("glam"))]
        rows += [(f"lm-eval, batch {size}", took) for size, took in best.items()]
        for who, took in rows:
            ratio = took["cpu_seconds"] / rows[0][1]["cpu_seconds"]
            wall = took["seconds"] / rows[0][1]["seconds"]
            print(
                f"| {num_experts} | {name} | {num_tokens:,} | {who} "
                f"| {1e3 * took['seconds'] / num_tokens:.2f} "
                f"| {1e3 * took['cpu_seconds'] / num_tokens:.2f} | {wall:.2f} | {ratio:.2f} "
                f"| {first['seconds']:.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival", help="python of an environment with lm-eval[hf] and torch")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    # Before jax starts its threads; the rival inherits it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    print(
        "| E | work | tokens | who | ms/token | processor ms/token | wall, times glam "
        "| processor, times glam | glam's first turn s |\n|--:|---|--:|---|--:|--:|--:|--:|--:|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for num_experts in options.experts:
            measure(options, num_experts, Path(folder))


if __name__ == "__main__":
    if hugepages.TUNABLE not in os.environ.get("GLIBC_TUNABLES", ""):
        environment = {**os.environ, "GLIBC_TUNABLES": f"{hugepages.TUNABLE}=1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    main()
