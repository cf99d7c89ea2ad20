"""Checks what the quick start promises: every source learnt, and questions above chance."""

import json
import sys
from pathlib import Path


def main(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    heldout = [line for line in lines if any(key.startswith("heldout/") for key in line)]
    first, last = heldout[0], heldout[-1]
    names = [key.removeprefix("unigram/") for key in last if key.startswith("unigram/")]
    assert len(names) >= 3, names
    for name in names:
        loss, entropy = last[f"heldout/{name}"], last[f"unigram/{name}"]
        assert loss < entropy - 0.1, f"{name}: held-out {loss:.3f}, unigram entropy {entropy:.3f}"
        assert loss < first[f"heldout/{name}"], f"{name}: the held-out loss did not fall"
    (results,) = (run / "eval").glob("quick-step*.json")
    tasks: dict[str, list[dict]] = {}
    for score in json.loads(results.read_text())["scores"]:
        tasks.setdefault(score["task"], []).extend(score["measured"])
    for task, measured in tasks.items():
        value = sum(m["value"] for m in measured) / len(measured)
        chance = max(b for m in measured for b in m["baselines"].values() if b is not None)
        error = max(m["stderr"] for m in measured)
        assert value > chance + 2 * error, f"{task}: {value:.3f} is not above {chance:.3f}"
    sys.stdout.write(f"quick start: {len(names)} sources learnt, {len(tasks)} tasks above chance\n")


main(Path(sys.argv[1]))
