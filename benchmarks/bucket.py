"""What a run in a bucket costs: requests per step and per save, seconds that a step waits, and what
a store does to it that takes 200 ms for every request, or fails or throttles for a minute.

    python benchmarks/bucket.py [--seconds 60] [--steps 4000]

Trains the small model of the tests on a disk and in buckets of a real server of objects on loopback
(fake-gcs-server), through a proxy that delays, refuses and counts. The same steps, seeds and saves
each time; all must end with the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import bucket
from runs import Run, write_recipe

SAVE_STEPS = 1000
DELETING_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of failing and of throttling")
    asked = parser.parse_args()
    server = bucket.object_server.__wrapped__()
    weather = bucket.Weather(next(server))
    os.environ.update(dict.fromkeys(bucket.NAMES, weather.url))
    try:
        with tempfile.TemporaryDirectory(prefix="glam-bucket-") as folder:
            measure_all(asked, weather, Path(folder))
    finally:
        weather.close()
        server.close()


def measure_all(asked: argparse.Namespace, weather: bucket.Weather, folder: Path) -> None:
    recipe = write_recipe(folder)
    new_bucket(weather.url, "bench-bucket")
    outcomes = {}
    for name, status, delay in (
        ("disk", None, 0.0),
        ("bucket", None, 0.0),
        ("bucket, 200 ms", None, 0.2),
        (f"bucket, 503 for {asked.seconds:.0f} s", 503, 0.0),
        (f"bucket, 429 for {asked.seconds:.0f} s", 429, 0.0),
    ):
        weather.delay, place = delay, f"gs://bench-bucket/{len(outcomes)}"
        run_dir = str(folder / "disk") if name == "disk" else place
        cache = {"XDG_CACHE_HOME": str(folder / f"cache-{len(outcomes)}")}
        sets = {"train.steps": asked.steps, "every.checkpoint_steps": SAVE_STEPS}
        sets |= {"every.log_steps": 1, "every.heldout_steps": "null", "heldout.rows": 1}
        words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        run = Run(recipe, Path(run_dir) if name == "disk" else run_dir, *words, **cache)
        print(f"## {name}", flush=True)
        told = watch(run, weather, status, asked.seconds)
        weather.delay = 0.0
        outcomes[name] = final_digests(run_dir, weather.url, asked.steps)
        report(told, asked.steps)
    same = all(each == outcomes["disk"] for each in outcomes.values())
    print(f"all {len(outcomes)} ended with the same bits: {same}")


def watch(run: Run, weather: bucket.Weather, status: int | None, seconds: float) -> dict[str, Any]:
    """What a run told and asked for, and when. `status` is the answer to all that it asks for in so
    many seconds, from its second save on."""
    told: dict[str, Any] = {"times": [], "saves": [], "warnings": []}
    weather.requests.clear()
    for event in run.events():
        now, num_asked = time.monotonic(), len(of_files(weather))
        if event["event"] == "step":
            told["times"].append((event["step"], now, num_asked))
            if status is not None and event["step"] == SAVE_STEPS + SAVE_STEPS // 2:
                weather.fault = lambda method, path: status
                threading.Timer(seconds, clear, [weather]).start()
        text = str(event.get("text", ""))
        if event["event"] == "say" and text.endswith(": saved"):
            told["saves"].append((int(text.split()[1][:-1]), now, num_asked))
        if event["event"] == "warn":
            told["warnings"].append(text)
    code, err = run.finish()
    assert code == 0, err
    told["lease"] = sum("lock.json" in path for _, path in weather.requests)
    return told


def clear(weather: bucket.Weather) -> None:
    weather.fault = lambda method, path: None


def of_files(weather: bucket.Weather) -> list[tuple[str, str]]:
    return [each for each in list(weather.requests) if "lock.json" not in each[1]]


def report(told: dict[str, Any], last: int) -> None:
    taken = {
        step: now - before
        for (_, before, _), (step, now, _) in zip(told["times"], told["times"][1:], strict=False)
    }
    saved = [step for step, _, _ in told["saves"]]
    at_saves = [taken[step + 1] for step in range(SAVE_STEPS, last, SAVE_STEPS)]
    usual = [seconds for step, seconds in taken.items() if step % SAVE_STEPS > 1]
    print(f"seconds per step: median {statistics.median(usual):.4f}, longest {max(usual):.3f}; the")
    print(f"step after a save was due: {', '.join(f'{each:.3f}' for each in at_saves)}")
    print(f"saved steps: {saved}")
    if len(told["saves"]) > 1 and told["saves"][-1][2]:
        pairs = zip(told["saves"], told["saves"][1:], strict=False)
        print(f"requests from one save to the next: {[b[2] - a[2] for a, b in pairs]}")
        print(f"of them while nothing was being saved: {[*idle_requests(told)]}")
    print(f"renewals of the lease: {told['lease']}")
    for warning in told["warnings"]:
        print(f"  warning: {warning}")
    sys.stdout.flush()


def idle_requests(told: dict[str, Any]) -> Iterator[int]:
    """For each save in time, requests from its end, and some seconds for deleting what went with
    it, to the step at which the next one is due."""
    for step, at, _ in told["saves"]:
        due = (step // SAVE_STEPS + 1) * SAVE_STEPS
        between = [
            num
            for number, now, num in told["times"]
            if step < number < due and now > at + DELETING_SECONDS
        ]
        if step % SAVE_STEPS == 0 and between:
            yield between[-1] - between[0]


def final_digests(run_dir: str, server: str, step: int) -> dict[str, Any]:
    name = f"{step}/meta/metadata"
    if "://" not in run_dir:
        return json.loads((Path(run_dir) / "checkpoints" / name).read_text())["digests"]
    object_name = run_dir.removeprefix("gs://bench-bucket/") + "%2Fsteps.json"
    url = f"{server}/storage/v1/b/bench-bucket/o/{object_name}?alt=media"
    with urllib.request.urlopen(url) as answer:
        return json.loads(json.loads(answer.read())[name])["digests"]


def new_bucket(server: str, name: str) -> None:
    body, kind = json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{server}/storage/v1/b", body, kind)).close()


if __name__ == "__main__":
    main()
