"""Questions about text the model has never seen: the quick suite, made from held-out documents.

Made from characters and words, never from tokens, so that runs with different tokenizers are
asked the same questions. Everything is drawn from hashes of the documents: the same documents
give the same questions. Sources take turns. Documents are cut into sections; every fifth section
is kept for demonstrations.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_Question = tuple[str, str, list[str]]
"""context, right answer, wrong ones"""

_SECTION_CHARS = 1500
# Short, so that five demonstrations fit into the rows of a small model.
_CONTEXT_CHARS = 80
_CONTINUATION_CHARS = 40
_PASSAGE_CHARS = 60
_NUM_OPTIONS = 4
_MAX_OVERLENGTH = 12
_MIN_READABLE = 0.85
_TRIES = 40
_ROUNDS = 8  # over the sections, each time for another position in them
_WORD = re.compile(r"(?<= )[A-Za-z]{4,12}(?=[\s.,;:])")


class _Section(NamedTuple):
    document: int
    text: str


def questions(
    documents: Mapping[str, Sequence[str]], build: str, count: int, part: str
) -> list[dict[str, Any]]:
    """Up to `count` questions, `items` or `pool` (for demonstrations), the sources in turn.

    Fewer come back when the documents do not hold more.
    """
    makers = {
        source: _BUILDS[build](_sections(texts, part), _rng(build, source, part))
        for source, texts in sorted(documents.items())
    }
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    while makers and len(made) < count:
        for source, maker in list(makers.items()):
            question = next(maker, None)
            if question is None:
                del makers[source]
                continue
            context, right, wrong = question
            if len(made) < count and context + right not in seen:
                seen.add(context + right)
                label = _position(len(made), 1 + len(wrong), build, part)
                options = [*wrong[:label], right, *wrong[label:]]
                fields = {"context": context, "options": options, "label": label, "source": source}
                made.append(fields)
    return made


def _position(number: int, num_options: int, build: str, part: str) -> int:
    """Of a question's right answer: every one once in as many questions, in a drawn order."""
    block = list(range(num_options))
    _rng(build, part, str(number // num_options)).shuffle(block)
    return block[number % num_options]


def _rng(*names: str) -> random.Random:
    return random.Random(hashlib.sha256("/".join(names).encode()).digest())


def _sections(documents: Sequence[str], part: str) -> list[_Section]:
    """Sections of the documents that belong to this part, in hash order."""
    found = [
        _Section(number, text[start : start + _SECTION_CHARS])
        for number, text in enumerate(documents)
        for start in range(0, len(text) - _SECTION_CHARS // 4 + 1, _SECTION_CHARS)
    ]
    found.sort(key=lambda each: hashlib.sha256(each.text.encode("utf-8", "replace")).digest())
    return found[::5] if part == "pool" else [each for i, each in enumerate(found) if i % 5]


def _continuations(sections: list[_Section], rng: random.Random) -> Iterator[_Question]:
    """Passages with their true next words among three from other documents of the source."""
    for section in sections * _ROUNDS:
        cut = _cut(section.text, rng, _CONTEXT_CHARS)
        right = _next_words(section.text, cut) if cut is not None else None
        if cut is None or right is None:
            continue
        others = [each for each in sections if each.document != section.document] or sections
        wrong: set[str] = set()
        for _ in range(_TRIES):
            other = rng.choice(others)
            start = _cut(other.text, rng, 0)
            if start is None or len(wrong) == _NUM_OPTIONS - 1:
                continue
            near = other is section and abs(start - cut) < _CONTEXT_CHARS
            text = _next_words(other.text, start)
            # A newline where the others have a blank would give the answer away.
            if text and text != right and text[0] == right[0] and not near:
                wrong.add(text)
        if len(wrong) == _NUM_OPTIONS - 1:
            context = _beginning_at_word(section.text[max(0, cut - _CONTEXT_CHARS) : cut])
            yield context, right, sorted(wrong)


def _last_words(sections: list[_Section], rng: random.Random) -> Iterator[_Question]:
    """Passages without their last word, which is among four of the same length."""
    by_length: dict[int, list[str]] = {}
    for section in sections:
        for word in _WORD.findall(section.text):
            by_length.setdefault(len(word), []).append(word)
    for section in sections * _ROUNDS:
        places = [m for m in _WORD.finditer(section.text) if m.start() >= _PASSAGE_CHARS]
        if not places:
            continue
        match = rng.choice(places)
        wrong: dict[str, str] = {}
        for _ in range(_TRIES):
            word = rng.choice(by_length[len(match.group())])
            if len(wrong) < _NUM_OPTIONS - 1 and word.lower() != match.group().lower():
                wrong[word.lower()] = word
        if len(wrong) == _NUM_OPTIONS - 1:
            context = section.text[match.start() - _PASSAGE_CHARS : match.start()].rstrip()
            yield _beginning_at_word(context), match.group(), sorted(wrong.values())


def _word_orders(sections: list[_Section], rng: random.Random) -> Iterator[_Question]:
    """A stretch of text and the same words in another order."""
    for section in sections * _ROUNDS:
        words = section.text.split()
        length = rng.randint(8, 12)
        if len(words) <= length:
            continue
        start = rng.randrange(1, len(words) - length)  # the first word may be cut
        chosen = words[start : start + length]
        if not _readable(" ".join(chosen)) or max(map(len, chosen)) > 20:
            continue
        mixed = list(chosen)
        for _ in range(_TRIES):
            rng.shuffle(mixed)
            if mixed != chosen:
                yield "", " ".join(chosen), [" ".join(mixed)]
                break


_BUILDS: dict[str, Callable[[list[_Section], random.Random], Iterator[_Question]]] = {
    "continuation": _continuations,
    "last_word": _last_words,
    "word_order": _word_orders,
}


def _cut(text: str, rng: random.Random, first: int) -> int | None:
    """A place after `first` characters where a word ends and a blank or newline follows."""
    last = len(text) - _CONTINUATION_CHARS - 20
    if last <= first:
        return None
    match = re.compile(r"(?<=\w)(?=[ \n]\S)").search(text, rng.randrange(first, last))
    return match.start() if match and match.start() < last else None


def _next_words(text: str, cut: int) -> str | None:
    """The words after a cut: _CONTINUATION_CHARS characters, and on to the end of a word."""
    end = re.compile(r"(?=\s)").search(text, cut + _CONTINUATION_CHARS)
    found = text[cut : end.start() if end else len(text)].rstrip()
    too_long = len(found) > _CONTINUATION_CHARS + _MAX_OVERLENGTH
    return None if too_long or not _readable(found) else found


def _readable(text: str) -> bool:
    """Mostly letters, digits and blanks: rulers and tables could be recognised by their shape."""
    return sum(char.isalnum() or char.isspace() for char in text) >= _MIN_READABLE * len(text)


def _beginning_at_word(text: str) -> str:
    return text.split(maxsplit=1)[1] if len(text.split(maxsplit=1)) == 2 else text
