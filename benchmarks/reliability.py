"""The figures of docs/reliability.md: what is lost when a run, its disk or its hosts fail.

    python benchmarks/reliability.py kills --trials 100
    python benchmarks/reliability.py crash-points
    python benchmarks/reliability.py io-errors
    python benchmarks/reliability.py flips --trials 200
    python benchmarks/reliability.py clean --trials 100
    python benchmarks/reliability.py hosts
    python benchmarks/reliability.py port
    python benchmarks/reliability.py inputs

Every trial is appended to `--results` as a line of JSON when it ends. Started again, a command goes
on with the trials that are missing for this very code; the last line it prints is the figure.
Nothing but a checkout with its development tools is needed; `crash-points` and `io-errors` need a C
compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import shim  # noqa: E402
from runs import (  # noqa: E402
    Run,
    assert_same_run,
    kill_at_a_random_moment,
    weights,
    write_recipe,
)

Outcome = dict[str, Any]
# Settings of runs of two processes: what takes long by default is short here.
HOSTS = ("runtime.heartbeat_seconds=10", "runtime.step_timeout_seconds=12", "train.steps=21")
ENDS = {"term": {75}, "hup": {75}, "stall": {86, 134, -6}}
"""The exit codes of both, where a fault lets them end by themselves."""
# Commands whose figure is that of tests: what is called once per input, and the tests.
TESTS = {
    "port": (
        ("socket:socket", "connect"),
        "tests/unit/hosts/test_greeting.py",
        "tests/unit/hosts/test_wire.py",
        "tests/hosts/test_lost.py::test_strangers_at_the_port_before_and_after_the_meeting_change_nothing",
    ),
    "inputs": (
        ("glamcli.cli.main", "_run"),
        "tests/cli/test_recipe.py::test_no_mutation_of_a_recipe_shows_a_traceback",
        "tests/faults/test_bombs.py",
        "tests/faults/test_hostile.py",
        "tests/faults/test_hostile_names.py",
        "tests/faults/test_hostile_records.py",
        "tests/faults/test_hostile_runs.py",
    ),
}
COUNTING = """
import pkgutil, pytest, sys
owner, name = pkgutil.resolve_name(sys.argv[1]), sys.argv[2]
called, calls = getattr(owner, name), []
setattr(owner, name, lambda *a, **k: calls.append(1) or called(*a, **k))
code = pytest.main(["-n", "0", "-q", "-m", "slow or not slow", *sys.argv[3:]])
print("calls", len(calls))
sys.exit(code)
"""


class Trials:
    """The trials of one command on the code as it is now, kept in a file of JSON lines."""

    def __init__(self, path: Path, command: str):
        self.path, self.command = path, command
        git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD:glamcli"]
        self.code = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [json.loads(line) for line in lines]
        mine = [x for x in kept if (x["command"], x["code"]) == (command, self.code)]
        self.done: dict[str, Outcome] = {x["trial"]: x for x in mine}

    def run(self, names: Iterable[object], trial: Callable[[str], Outcome]) -> list[Outcome]:
        """The outcome of every trial, of those that were missing by running them."""
        wanted = [str(name) for name in names]
        for name in wanted:
            if name not in self.done:
                began = time.monotonic()
                outcome = trial(name)
                seconds = round(time.monotonic() - began, 1)
                about = {"command": self.command, "trial": name, "code": self.code}
                line = {**about, "date": str(date.today()), "seconds": seconds, **outcome}
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                self.done[name] = line
                print(json.dumps(line), flush=True)
        return [self.done[name] for name in wanted]


def figure(outcomes: list[Outcome], words: str, **more: object) -> int:
    """Prints how many trials went well; the exit code."""
    bad = [outcome["trial"] for outcome in outcomes if not outcome["ok"]]
    said = ", ".join(f"{name} {value}" for name, value in more.items())
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} {words}" + (f"; {said}" if said else ""))
    if bad:
        print(f"not: {', '.join(bad[:20])}")
    return bool(bad)


def same(clean: Path, folder: Path, step: int) -> Outcome:
    """Whether a run ended with every bit, and every line of metrics, of the clean one."""
    try:
        assert_same_run(clean, folder, step)
    except AssertionError as error:
        return {"ok": False, "reason": str(error)[:300]}
    return {"ok": True}


def kills(trials: Trials, work: Path, count: int) -> int:
    """kill -9 once at a random moment of a run, which is then started again and left alone."""
    recipe = write_recipe(work)
    clean = Run(recipe, work / "clean")
    num_lines = sum(1 for _ in clean.events())
    assert clean.finish()[0] == 0

    def trial(name: str) -> Outcome:
        folder = work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        kill_at_a_random_moment(Run(recipe, folder), random.Random(f"kill {name}"), num_lines)
        again = Run(recipe, folder)
        said = [event.get("text", "") for event in again.events()]
        code, err = again.finish()
        if code:
            return {"ok": False, "reason": err[:300]}
        return {**same(clean.folder, folder, 40), "from": [x for x in said if "continuing" in x]}

    return figure(trials.run(range(count), trial), "ended bit-identical to the clean run")


def struck(trials: Trials, work: Path, modes: list[tuple[str, str]], stride: int) -> int:
    """A save that is killed, or fails, at every call that changes files."""
    built = shim.compiled(work)
    if built is None:
        print("no C compiler here")
        return 1
    base = work / "base"
    shim.first_steps(base)
    num_calls = len(shim.save(built, shutil.copytree(base, work / "log")).calls)

    def trial(name: str) -> Outcome:
        mode, error, at = name.split(" ")
        folder = work / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        result = shim.save(built, shutil.copytree(base, folder), int(at), mode, error)
        found = shim.problems(folder, result, int(at))
        return {"ok": not found, "at": result.at(int(at)), "failures": result.failures} | (
            {"reason": found} if found else {}
        )

    names = [f"{mode} {error} {at}" for mode, error in modes for at in range(1, num_calls, stride)]
    outcomes = trials.run(names, trial)
    completed = sum(not any(o["failures"]) and o["failures"] != [] for o in outcomes)
    words = "left the newest complete step exact, and the next start saved"
    slowest = max(outcome["seconds"] for outcome in outcomes)
    return figure(outcomes, words, calls=num_calls, completed=completed, slowest=f"{slowest} s")


def restores(trials: Trials, work: Path, count: int, flipping: bool) -> int:
    """The newest checkpoint of a run is restored, whole or after one of its bits has changed."""
    from glamcli.errors import DamagedCheckpoint

    run = Run(write_recipe(work), work / "run", "--set", "train.steps=14")
    assert run.finish()[0] == 0
    clean, folder = weights(work / "run", 14), work / "copy"
    step = folder / "checkpoints/14"
    # What describes the arrays, and the arrays themselves: weights and optimizer state.
    described = ("meta/metadata", "state/_METADATA")
    files = sorted(
        (work / "run/checkpoints/14/state").glob("**/d/*"), key=lambda p: p.stat().st_size
    )
    values = [str(path.relative_to(work / "run/checkpoints/14")) for path in files[-1:]]

    def flip(rng: random.Random, path: Path) -> str:
        data = bytearray(path.read_bytes())
        position, bit = rng.randrange(len(data)), rng.randrange(8)
        data[position] ^= 1 << bit
        path.write_bytes(data)
        return f"bit {bit} of byte {position} of {path.relative_to(step)}"

    def trial(name: str) -> Outcome:
        rng, where = random.Random(f"flip {name}"), "nowhere"
        for missed in range(100):  # some bytes of these files are in no array
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(work / "run", folder)
            if flipping:
                where = flip(rng, step / rng.choice(described if int(name) % 3 == 0 else values))
            try:
                restored = weights(folder, 14)
            except DamagedCheckpoint as error:
                said = error.what.split("cannot be used: ")[-1][:160]
                return {"ok": flipping, "where": where, "found": said, "missed": missed}
            wrong = [k for k in clean if clean[k].tobytes() != restored[k].tobytes()]
            if wrong or not flipping:
                return {"ok": not wrong, "where": where, "used": wrong}
        return {"ok": False, "where": where, "used": []}

    outcomes = trials.run(range(count), trial)
    if not flipping:
        return figure(outcomes, "restores gave the bits that were saved, without an alarm")
    kinds = ("params", "opt_state")
    of = {kind: sum(f"`{kind}" in o.get("found", "") for o in outcomes) for kind in kinds}
    of["descriptions"] = sum(outcome["ok"] for outcome in outcomes) - sum(of.values())
    used = sum(not outcome["ok"] for outcome in outcomes)
    missed = sum(outcome.get("missed", 0) for outcome in outcomes)
    return figure(outcomes, "flipped bits were found", used=used, **of, elsewhere=missed)


def hosts(trials: Trials, work: Path) -> int:
    """One of two processes is killed, stopped, stalled or asked to stop; both are started again."""
    recipe = write_recipe(work)

    def start(folder: Path, fault: str = "") -> list[Run]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        sets = [part for each in HOSTS for part in ("--set", each)]
        sets += ["--allow-faults"] if fault else []
        place = ("--coordinator", address, "--num-processes", "2", "--process-id")
        both = [
            Run(recipe, folder, *place, str(k), *sets, num_devices=4, GLAM_FAULT=fault)
            for k in (1, 0)
        ]
        return both[::-1]

    clean = start(work / "clean")
    assert [run.finish()[0] for run in clean] == [0, 0]

    def trial(name: str) -> Outcome:
        kind, victim = name.split(" of ")
        folder = work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        runs = start(folder, f"{kind}@11:{victim}")
        runs[0].until_step(9)
        began = time.monotonic()
        survivor = runs[1 - int(victim)]
        codes: list[int | None] = [None, None]
        codes[1 - int(victim)] = survivor.finish()[0]
        waited = round(time.monotonic() - began, 1)
        if kind == "stop":  # nothing but a kill ends it, as its supervisor would
            runs[int(victim)].process.send_signal(signal.SIGKILL)
        codes[int(victim)] = runs[int(victim)].finish()[0]
        if not set(codes) <= ENDS.get(kind, {134, -6, -signal.SIGKILL}):
            return {"ok": False, "codes": codes, "reason": "other exit codes than documented"}
        again = [run.finish() for run in start(folder)]
        if any(code for code, _ in again):
            return {"ok": False, "codes": codes, "reason": str(again)[:300]}
        return {**same(clean[0].folder, folder, 21), "codes": codes, "other_ended_after_s": waited}

    kinds = ("kill", "stop", "stall", "term", "hup")
    outcomes = trials.run([f"{kind} of {k}" for kind in kinds for k in (0, 1)], trial)
    slowest = max(outcome.get("other_ended_after_s", 0) for outcome in outcomes)
    words = "ended both and went on bit-identically"
    return figure(outcomes, words, slowest=f"{slowest} s")


def tested(trials: Trials, command: str) -> int:
    """The figure of tests that try many inputs, of which each calls one function once."""
    (owner, name), *paths = TESTS[command]

    def trial(_: str) -> Outcome:
        ended = subprocess.run(
            [sys.executable, "-c", COUNTING, owner, name, *paths],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        *_, said, calls = ended.stdout.strip().splitlines()
        return {"ok": ended.returncode == 0, "tests": said, "tried": int(calls.split()[-1])}

    (outcome,) = trials.run([command], trial)
    return figure([outcome], f"suites passed ({outcome['tests']})", tried=outcome["tried"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = ("kills", "crash-points", "io-errors", "flips", "clean", "hosts", *TESTS)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--trials", type=int, default=30, help="of kills, flips and clean")
    parser.add_argument("--stride", type=int, default=1, help="every so many calls of a save")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/reliability.jsonl"
    )
    asked = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, and by what it starts
    trials = Trials(asked.results, asked.command)
    if asked.command in TESTS:
        return tested(trials, asked.command)
    with tempfile.TemporaryDirectory(prefix="glam-reliability-") as folder:
        work = Path(folder)
        if asked.command == "kills":
            return kills(trials, work, asked.trials)
        if asked.command == "crash-points":
            return struck(trials, work, [("kill", "EIO")], asked.stride)
        if asked.command == "io-errors":
            modes = [("fail", "EIO"), ("fail", "EACCES"), ("failfrom", "ENOSPC")]
            return struck(trials, work, modes, asked.stride)
        if asked.command in ("flips", "clean"):
            return restores(trials, work, asked.trials, asked.command == "flips")
        return hosts(trials, work)


if __name__ == "__main__":
    sys.exit(main())
