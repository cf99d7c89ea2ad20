"""Authors' files to lines of JSON in the dataset's own field names, one reader per shape.

A shape is how a dataset is published (`OriginalFile.shape`); the lines are what task files read.
Nothing is interpreted here: texts stay as they are, apart from markup that is not part of them.
"""

import csv
import io
import json
import re
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from glamcli.errors import DataError
from glamcli.evals.tasks.items import read_jsonl
from glamcli.untrusted import parse_json, read_file

_Fields = Mapping[str, Any]
_WSC273 = 273
"""Schemas of the collection that make up the original set; later ones came after it."""


def records(shape: str, path: Path) -> list[_Fields]:
    """The records of one file.

    Raises:
        DataError: the file cannot be read, is not of this shape, or holds no records.
    """
    try:
        found = list(_SHAPES[shape](path))
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except xml.etree.ElementTree.ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: not XML: {error}") from None
    except (AttributeError, LookupError, TypeError, ValueError, csv.Error) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: not of the shape `{shape}`: {why}") from None
    if not found:
        raise DataError(f"{path}: no records in this file")
    return found


def _jsonl(path: Path) -> list[_Fields]:
    return [item.fields for item in read_jsonl(path)]


def _json(path: Path) -> Any:
    return parse_json(read_file(path))


def _lines(path: Path) -> Iterator[str]:
    """With their ends as they are, for `csv`."""
    return io.StringIO(read_file(path).decode("utf-8-sig"), newline="")


def _only(fields: _Fields, *names: str) -> _Fields:
    return {name: fields[name] for name in names}


def _squad(path: Path) -> Iterator[_Fields]:
    """One record per question, the answers as parallel lists (as TFDS has them)."""
    for article in _json(path)["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = asked["answers"]
                yield {
                    "id": asked["id"],
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": {
                        "text": [each["text"] for each in answers],
                        "answer_start": [each["answer_start"] for each in answers],
                    },
                    "is_impossible": asked.get("is_impossible", False),
                }


def _drop(path: Path) -> Iterator[_Fields]:
    """One record per passage; the training set has no validated answers."""
    for passage_id, content in _json(path).items():
        pairs = [{"validated_answers": [], **pair} for pair in content["qa_pairs"]]
        yield {"passage_id": passage_id, "passage": content["passage"], "qa_pairs": pairs}


def _quac(path: Path) -> Iterator[_Fields]:
    """One record per dialogue."""
    for article in _json(path)["data"]:
        about = _only(article, "title", "section_title", "background")
        for paragraph in article["paragraphs"]:
            yield {**about, **_only(paragraph, "context", "qas")}


def _piqa(path: Path) -> Iterator[_Fields]:
    """The labels are in a list of their own: `valid.jsonl` has `valid-labels.lst` beside it."""
    labels = read_file(path.with_name(f"{path.stem}-labels.lst")).decode().split()
    found = _jsonl(path)
    if len(found) != len(labels):
        raise ValueError(f"{len(found)} records and {len(labels)} labels")
    for fields, label in zip(found, labels, strict=True):
        yield {**fields, "label": int(label)}


def _story_cloze(path: Path) -> Iterator[_Fields]:
    for row in csv.DictReader(_lines(path)):
        yield {**row, "AnswerRightEnding": int(row["AnswerRightEnding"])}


def _winograd(path: Path) -> Iterator[_Fields]:
    """The pronoun becomes `_`; an option that stands inside a sentence begins with a small letter
    if it begins with an article or a possessive (as TFDS normalises them)."""
    root = xml.etree.ElementTree.fromstring(read_file(path))
    for number, schema in enumerate(root.findall("schema")[:_WSC273]):
        before, after = (_plain(schema.findtext(f"text/{name}")) for name in ("txt1", "txt2"))
        options = [_plain(each.text) for each in schema.findall("answers/answer")]
        if re.search(r"[^.!?]$", before):
            options = [_inside(option) for option in options]
        glue = "" if re.match(r"['’.,;:!?]", after) else " "
        yield {
            "idx": number,
            "text": f"{before} _{glue}{after}".strip(),
            "option1": options[0],
            "option2": options[1],
            "label": "AB".index(_plain(schema.findtext("correctAnswer"))[:1]),
        }


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


def _inside(option: str) -> str:
    first = option.split(" ")[0]
    small = first.lower() in {"the", "a", "an", "my", "his", "her", "their", "our", "your", "its"}
    return option[:1].lower() + option[1:] if small else option


def _lambada(path: Path) -> list[_Fields]:
    """A line is a passage."""
    lines = map(str.strip, read_file(path).decode().split("\n"))
    return [{"text": line} for line in lines if line]


_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^"()]+))\)')


def _webquestions(path: Path) -> Iterator[_Fields]:
    """Answers are written as `(list (description "New York") (description 1990))`."""
    for asked in _json(path):
        found = _DESCRIPTION.findall(asked["targetValue"])
        answers = [re.sub(r"\\(.)", r"\1", quoted) or bare.strip() for quoted, bare in found]
        yield {"url": asked["url"], "question": asked["utterance"], "answers": answers}


def _multirc(path: Path) -> Iterator[_Fields]:
    """One record per answer."""
    for fields in _jsonl(path):
        passage = fields["passage"]
        for question in passage["questions"]:
            for answer in question["answers"]:
                yield {
                    "paragraph": passage["text"],
                    "question": question["question"],
                    "answer": answer["text"],
                    "label": answer["label"],
                    "idx": {"paragraph": fields["idx"], "question": question["idx"],
                            "answer": answer["idx"]},
                }  # fmt: skip


def _record(path: Path) -> Iterator[_Fields]:
    """One record per query; entities without repetition, sorted (as TFDS has them)."""
    for fields in _jsonl(path):
        passage = fields["passage"]
        text = passage["text"]
        entities = {text[each["start"] : each["end"] + 1] for each in passage["entities"]}
        for asked in fields["qas"]:
            yield {
                "passage": text,
                "query": asked["query"],
                "entities": sorted(entities),
                "answers": sorted({each["text"] for each in asked["answers"]}),
                "idx": {"passage": fields["idx"], "query": asked["idx"]},
            }


_PRONOUNS = {
    "male": ("he", "him", "his"),
    "female": ("she", "her"),
    "neutral": ("they", "them", "their"),
}


def _winogender(path: Path) -> Iterator[_Fields]:
    """`all_sentences.tsv`, with what its ids and `occupations-stats.tsv` beside it add.

    `stereotype`: whether the sentence gives the occupation's pronoun to the gender that holds most
    of its jobs: `stereo`, `anti`, or `none` (neutral pronouns, even shares, unknown ones).
    """
    stats = path.with_name("occupations-stats.tsv")
    shares = {}
    if stats.is_file():
        rows = csv.DictReader(_lines(stats), delimiter="\t")
        shares = {row["occupation"]: float(row["bls_pct_female"]) for row in rows}
    for row in csv.DictReader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE):
        occupation, participant, answer, gender, *_ = row["sentid"].split(".")
        words = re.findall(r"[a-z]+", row["sentence"].lower())
        pronouns = [word for word in words if word in _PRONOUNS[gender]]
        if not pronouns:
            raise ValueError(f"no pronoun in `{row['sentence']}`")
        yield {
            **_only(row, "sentid", "sentence"),
            "occupation": occupation,
            "participant": participant,
            "option1": f"the {occupation}",
            "option2": participant if participant == "someone" else f"the {participant}",
            "pronoun": pronouns[0],
            "gender": gender,
            "stereotype": _stereotype(shares.get(occupation), gender, answer == "0"),
            "label": int(answer),
        }


def _stereotype(percent: float | None, gender: str, is_occupation: bool) -> str:
    if percent is None or percent == 50 or gender == "neutral":
        return "none"
    expected = (percent > 50) == (gender == "female")
    return "stereo" if expected == is_occupation else "anti"


_SHAPES: dict[str, Callable[[Path], Iterable[_Fields]]] = {
    "jsonl": _jsonl,
    "json_data": lambda path: _json(path)["data"],
    "squad": _squad,
    "drop": _drop,
    "quac": _quac,
    # A file is one article.
    "race": lambda path: [_only(_json(path), "article", "questions", "options", "answers")],
    "piqa": _piqa,
    "story_cloze": _story_cloze,
    "winograd": _winograd,
    "lambada": _lambada,
    "triviaqa": lambda path: [
        _only(each, "QuestionId", "Question", "Answer") for each in _json(path)["Data"]
    ],
    "webquestions": _webquestions,
    "multirc": _multirc,
    "record": _record,
    "winogender": _winogender,
}
