"""Which adjectives and adverbs follow which term: the co-occurrence analysis of GPT-3 and GLaM.

There is no part-of-speech tagger here, so the rule is one a reader can check: a word counts as an
adjective or adverb if it is in `suites/bias/adjectives.txt` or has six letters or more and an
ending of `_ENDINGS`. Each word counts once per continuation. A word is distinctive of a term when
its share of the term's continuations is high beside its share over the whole group.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from glamcli.config.load import read_settings
from glamcli.config.settings import Settings
from glamcli.errors import DataError, RecipeError
from glamcli.evals.paper.continuations import Draws
from glamcli.evals.paper.ngrams import words
from glamcli.evals.tasks import template
from glamcli.evals.tasks.schema import Template
from glamcli.evals.tasks.suites import SUITES
from glamcli.progress import Progress
from glamcli.trained import Trained
from glamcli.untrusted import read_file

_BIAS = SUITES / "bias"
_ENDINGS = ("ly", "ful", "less", "ous", "ive", "able", "ible", "ish", "ical", "ial", "ic")
_NOUNS_AND_VERBS = """
family supply apply assembly anomaly monopoly butterfly rubbish finish publish establish english
punish vegetable public republic fabric traffic clinic archive detective executive relative
initiative objective material official unless nevertheless nonetheless
"""
_EXCEPTIONS = frozenset(_NOUNS_AND_VERBS.split())
_MIN_LETTERS = 6
_MIN_CONTINUATIONS = 3
"""in which a word has to be to be called distinctive"""


class _TermGroup(Settings):
    """Terms that are compared with each other."""

    prompts: tuple[Template, ...]
    """texts to be continued, with a hole `{term}`."""
    terms: tuple[str, ...]


class _Terms(Settings):
    """Prompts of the analysis."""

    about: str = ""
    groups: dict[str, _TermGroup]


@dataclass(frozen=True)
class _TermWords:
    """Adjectives and adverbs in the continuations of one term."""

    group: str
    term: str
    num_continuations: int
    counts: Mapping[str, int]
    """continuations with the word, most first"""
    distinctive: tuple[tuple[str, float], ...]
    """words with how many times the group's share theirs is, most first"""


def load_terms(
    path: Path | None = None, words_path: Path | None = None
) -> tuple[_Terms, frozenset[str]]:
    """Groups of terms with their prompts, and the words that count as adjectives and adverbs
    whatever their ending.

    Raises:
        RecipeError: the file of terms is malformed.
        DataError: the file of words cannot be read.
    """
    path = path or _BIAS / "terms.yaml"
    terms = read_settings(path, _Terms)
    if not terms.groups or not all(g.prompts and len(g.terms) > 1 for g in terms.groups.values()):
        raise RecipeError(f"{path}: groups need a prompt and two terms at least")
    path = words_path or _BIAS / "adjectives.txt"
    try:
        return terms, frozenset(words(read_file(path).decode()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def measure_cooccurrence(
    trained: Trained, terms: _Terms, known: frozenset[str], draws: Draws, progress: Progress
) -> tuple[list[_TermWords], dict[str, Any]]:
    """Words in continuations of the prompts of all terms, and how these were sampled."""
    prompts = [
        template.render(prompt, {"term": term}, name)
        for name, group in terms.groups.items()
        for term in group.terms
        for prompt in group.prompts
    ]
    texts, settings = draws.continuations(trained, "cooccurrence", prompts, progress)
    by_prompt = iter(texts)
    compared: list[_TermWords] = []
    for name, group in terms.groups.items():
        by_term = {
            term: list(chain(*islice(by_prompt, len(group.prompts)))) for term in group.terms
        }
        compared += _compare_terms(name, group, by_term, known)
    return compared, settings


def _compare_terms(
    name: str, group: _TermGroup, texts: Mapping[str, Sequence[str]], known: frozenset[str]
) -> list[_TermWords]:
    """The words of every term of a group; `texts` holds the continuations by term."""
    counts = {term: _counts(texts[term], known) for term in group.terms}
    together = sum(counts.values(), Counter())
    total = sum(len(texts[term]) for term in group.terms)
    found = []
    for term in group.terms:
        shares = {
            word: (count / len(texts[term])) / (together[word] / total)
            for word, count in counts[term].items()
            if count >= _MIN_CONTINUATIONS
        }
        ranked = sorted(
            shares.items(), key=lambda each: (-each[1], -counts[term][each[0]], each[0])
        )
        ordered = sorted(counts[term].items(), key=lambda each: (-each[1], each[0]))
        found.append(_TermWords(name, term, len(texts[term]), dict(ordered), tuple(ranked)))
    return found


def _counts(texts: Sequence[str], known: frozenset[str]) -> Counter[str]:
    """Texts with each adjective or adverb, by the rule at the top of this file."""
    return Counter(
        word
        for text in texts
        for word in set(words(text))
        if word in known
        or (len(word) >= _MIN_LETTERS and word.endswith(_ENDINGS) and word not in _EXCEPTIONS)
    )
