"""Many sampled continuations of each of many prompts, kept in RUN/bias as they come.

The file of texts begins with a line that says how they were sampled; each further line is a prompt
with its continuations. A second start with the same settings reuses the lines that are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glamcli import atomic
from glamcli.evals.results.store import free_path
from glamcli.generate import Generator, Sampling
from glamcli.model.digest import digest
from glamcli.progress import Progress
from glamcli.trained import Trained

_BATCH_ROWS = 100
"""continuations of one prompt that grow side by side"""
_BIAS_FOLDER = "bias"
"""of a run folder"""
_TOP_K = 40


@dataclass(frozen=True)
class Draws:
    """How many continuations of each prompt are sampled, and how; at temperature 1."""

    samples: int
    tokens: int
    """of a continuation, at most."""
    top_k: int = _TOP_K
    seed: int = 0

    def stem(self, trained: Trained, analysis: str) -> str:
        """The name of the files: texts that are sampled in another way have other files."""
        parts = [f"step{trained.identity['step']}", analysis]
        parts += [f"samples{self.samples}", f"tokens{self.tokens}"]
        parts += [f"top{self.top_k}"] if self.top_k != _TOP_K else []
        parts += [f"seed{self.seed}"] if self.seed else []
        return "-".join(parts)


def continuations(
    trained: Trained, analysis: str, prompts: Sequence[str], draws: Draws, progress: Progress
) -> tuple[list[list[str]], dict[str, Any]]:
    """The continuations of every prompt, and how they were made, for the results.

    Those of an earlier start of the same analysis are read from the run folder.
    """
    sampling = Sampling(temperature=1.0, top_k=draws.top_k)
    settings = {
        "params_digest": digest(trained.params),
        "tokenizer": trained.tokenizer.fingerprint,
        "samples": draws.samples,
        "tokens": draws.tokens,
        "seed": draws.seed,
        **asdict(sampling),
    }
    path = None
    if trained.run_dir is not None:
        path = trained.run_dir / _BIAS_FOLDER / f"{draws.stem(trained, analysis)}.texts.jsonl"

    def sample(prompt: str) -> list[str]:
        return _sampled(trained.generator, prompt, sampling, draws)

    with progress.phase("sampling", len(prompts), "prompts") as phase:
        texts = resumed(prompts, sample, path, settings, phase.advance)
    return texts, {**settings, "model": dict(trained.identity)}


def resumed(
    prompts: Sequence[str],
    sample: Callable[[str], list[str]],
    path: Path | None,
    settings: Mapping[str, Any],
    advance: Callable[[int], None],
) -> list[list[str]]:
    """The texts of every prompt; those in the file at `path` are taken from it, others added."""
    found = {} if path is None else _kept(path, settings)
    if path is not None and not found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_line({"settings": dict(settings)}), encoding="utf-8")
    made = []
    for number, prompt in enumerate(prompts):
        if number not in found or found[number][0] != prompt:
            found[number] = (prompt, sample(prompt))
            if path is not None:
                with path.open("a", encoding="utf-8", errors="replace") as file:
                    texts = found[number][1]
                    file.write(_line({"number": number, "prompt": prompt, "texts": texts}))
        made.append(found[number][1])
        advance(1)
    return made


def keep_analysis(
    trained: Trained, analysis: str, draws: Draws, content: Mapping[str, Any], progress: Progress
) -> None:
    """Writes RUN/bias/STEM.json, or STEM-2 if other prompts, words or scorers have the name."""
    if trained.run_dir is None:
        return
    folder = trained.run_dir / _BIAS_FOLDER

    def is_same(path: Path) -> bool:
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            return other["asked"] == content["asked"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = free_path(folder, draws.stem(trained, analysis), is_same)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        progress.warn(f"not kept: {error.strerror or error}: {folder}")
        return
    progress.say(f"kept in {path}")


def _sampled(generator: Generator, prompt: str, sampling: Sampling, draws: Draws) -> list[str]:
    """Continuations of one prompt, drawn from (seed, prompt)."""
    texts: list[str] = []
    while len(texts) < draws.samples:
        count = min(_BATCH_ROWS, draws.samples - len(texts))
        name = f"{draws.seed}/{len(texts)}/{prompt}".encode("utf-8", "replace")
        seed = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") >> 1
        texts += generator.texts(prompt, sampling, tokens=draws.tokens, samples=count, seed=seed)
    return texts


def _kept(path: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, list[str]]]:
    """The lines of an earlier start with the same settings; a half-written last one is dropped."""
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
