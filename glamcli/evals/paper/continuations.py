"""Many sampled continuations of each of many prompts, kept in RUN/bias as they come.

The file of texts begins with a line that says how they were sampled, of which weights; its name has
a digest of that. Each further line is a prompt with its continuations. A second start with the same
settings reuses the lines that are there.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glamcli import atomic
from glamcli.evals.results.journal import inputs_digest
from glamcli.evals.results.store import keep_analysis
from glamcli.generate import Generator, Sampling
from glamcli.model.digest import digest
from glamcli.progress import Progress
from glamcli.stored_runs import BIAS_FOLDER
from glamcli.trained import Trained
from glamcli.untrusted import parse_as, read_file

_BATCH_ROWS = 100
"""continuations of one prompt that grow side by side"""
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
        self, trained: Trained, analysis: str, prompts: Sequence[str], progress: Progress
    ) -> tuple[list[list[str]], dict[str, Any]]:
        """The continuations of every prompt, and how they were made, for the results.

        Those of an earlier start of the same analysis are read from the run folder.
        """
        sampling = Sampling(temperature=1.0, top_k=self.top_k)
        settings = {
            "params_digest": digest(trained.params),
            "tokenizer": trained.tokenizer.fingerprint,
            "samples": self.samples,
            "tokens": self.tokens,
            "seed": self.seed,
            **asdict(sampling),
        }
        path = None
        if trained.run_dir is not None:
            name = f"{self.stem(trained, analysis)}-{inputs_digest([settings])[:8]}.texts.jsonl"
            path = trained.run_dir / BIAS_FOLDER / name

        def sample(prompt: str) -> list[str]:
            return _sampled(trained.generator, prompt, sampling, self)

        with progress.phase("sampling", len(prompts), "prompts") as phase:
            texts = _resumed(prompts, sample, path, settings, phase.advance)
        return texts, {**settings, "model": dict(trained.identity)}

    def keep(
        self, trained: Trained, analysis: str, content: Mapping[str, Any], progress: Progress
    ) -> None:
        """Writes RUN/bias/STEM.json, or STEM-2 if other prompts, words or scorers have the name."""
        if trained.run_dir is not None:
            folder = trained.run_dir / BIAS_FOLDER
            keep_analysis(content, folder, self.stem(trained, analysis), progress)


@dataclass(frozen=True)
class _Kept:
    """A line of the file."""

    number: int
    prompt: str
    texts: list[str]


def _resumed(
    prompts: Sequence[str],
    sample: Callable[[str], list[str]],
    path: Path | None,
    settings: Mapping[str, Any],
    advance: Callable[[int], None],
) -> list[list[str]]:
    """The texts of every prompt; those in the file at `path` are taken from it, others added."""
    found, kept = {}, None
    if path is not None:
        found, whole = _kept(path, _line({"settings": dict(settings)}))
        kept = atomic.Lines(path, whole)
    try:
        for number, prompt in enumerate(prompts):
            if number not in found or found[number][0] != prompt:
                texts = sample(prompt)
                found[number] = (prompt, texts)
                if kept is not None:
                    kept.add(_line({"number": number, "prompt": prompt, "texts": texts}))
            advance(1)
    finally:
        if kept is not None:
            kept.flush()
    return [found[number][1] for number in range(len(prompts))]


def _sampled(generator: Generator, prompt: str, sampling: Sampling, draws: Draws) -> list[str]:
    """Continuations of one prompt, drawn from (seed, prompt)."""
    texts: list[str] = []
    while len(texts) < draws.samples:
        count = min(_BATCH_ROWS, draws.samples - len(texts))
        name = f"{draws.seed}/{len(texts)}/{prompt}".encode("utf-8", "replace")
        seed = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") >> 1
        texts += generator.texts(prompt, sampling, tokens=draws.tokens, samples=count, seed=seed)
    return texts


def _kept(path: Path, head: bytes) -> tuple[dict[int, tuple[str, list[str]]], bytes]:
    """The texts of an earlier start with the same settings, and what of the file is whole."""
    found: dict[int, tuple[str, list[str]]] = {}
    whole = [head]
    with contextlib.suppress(OSError, ValueError):
        lines = read_file(path).splitlines(keepends=True)
        for line in lines[1:] if lines[:1] == [head] else ():
            each = parse_as(_Kept, line)
            found[each.number] = (each.prompt, each.texts)
            whole.append(line)
    return found, b"".join(whole)


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace")
