"""Many sampled continuations of each of many prompts, kept as they come, so that none is lost.

The file begins with a line that says how it was sampled; each further line is a prompt with its
continuations. A run that goes on with the same settings keeps the lines that are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glamcli import atomic
from glamcli.generate import Generator, Sampling

BATCH_ROWS = 100
"""continuations of one prompt that grow side by side"""


def continued(
    generator: Generator,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    tokens: int,
    samples: int,
    seed: int,
    path: Path | None,
    settings: Mapping[str, Any],
    advance: Callable[[int], None],
) -> list[list[str]]:
    """The continuations of every prompt; those in the file at `path` are not made again."""
    found = {} if path is None else _kept(path, settings)
    if path is not None and not found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_line({"settings": dict(settings)}), encoding="utf-8")
    made = []
    for number, prompt in enumerate(prompts):
        if number not in found or found[number][0] != prompt:
            texts = sampled(generator, prompt, sampling, tokens, samples, seed)
            found[number] = (prompt, texts)
            if path is not None:
                with path.open("a", encoding="utf-8", errors="replace") as file:
                    file.write(_line({"number": number, "prompt": prompt, "texts": texts}))
        made.append(found[number][1])
        advance(1)
    return made


def sampled(
    generator: Generator, prompt: str, sampling: Sampling, tokens: int, samples: int, seed: int
) -> list[str]:
    """Continuations of one prompt, drawn from (seed, prompt)."""
    texts: list[str] = []
    while len(texts) < samples:
        count = min(BATCH_ROWS, samples - len(texts))
        name = hashlib.sha256(f"{seed}/{len(texts)}/{prompt}".encode("utf-8", "replace")).digest()
        drawn = int.from_bytes(name[:4], "big") >> 1
        texts += generator.texts(prompt, sampling, tokens=tokens, samples=count, seed=drawn)
    return texts


def _kept(path: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, list[str]]]:
    """What an earlier run with the same settings left; a half-written last line is dropped."""
    found: dict[int, tuple[str, list[str]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if not lines or json.loads(lines[0])["settings"] != dict(settings):
            return {}
        for line in lines[1:]:
            each = json.loads(line)
            found[each["number"]] = (each["prompt"], each["texts"])
    except (OSError, ValueError, KeyError, TypeError):
        if not found:
            return {}
        whole = [{"settings": dict(settings)}]
        whole += [{"number": n, "prompt": p, "texts": t} for n, (p, t) in found.items()]
        atomic.write(path, "".join(map(_line, whole)).encode(errors="replace"))
    return found


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
