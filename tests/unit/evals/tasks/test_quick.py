import random
from collections import Counter

import pytest

from glamcli.evals.tasks.quick import questions

WORDS = [
    a + b for a in ("ti", "per", "wor", "les", "mon") for b in ("me", "son", "ter", "ld", "ey")
]


def document(seed: int, words: int = 700) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n"]) for _ in range(words))


DOCUMENTS = {
    "books": [document(i) for i in range(6)],
    "code": [document(100)],
    "tiny": ["short"],
    "empty": [],
}


@pytest.mark.parametrize("build", ["continuation", "last_word", "word_order"])
@pytest.mark.parametrize("part", ["items", "pool"])
def test_questions_are_the_same_every_time_and_take_sources_in_turn(build, part):
    made = questions(DOCUMENTS, build, 20, part)
    assert made == questions(DOCUMENTS, build, 20, part)
    assert len(made) == 20 or part == "pool"
    assert {"books", "code"} <= {each["source"] for each in made}


@pytest.mark.parametrize("build", ["continuation", "last_word", "word_order"])
def test_options_are_distinct_and_every_position_is_right_equally_often(build):
    made = questions(DOCUMENTS, build, 60, "items")
    for each in made:
        assert len(set(each["options"])) == len(each["options"])
    counts = Counter(each["label"] for each in made)
    assert set(counts.values()) == {60 // len(made[0]["options"])}
    labels = [each["label"] for each in made]
    assert labels != sorted(labels[:4]) * 15


def test_the_right_continuation_is_in_the_text_and_the_wrong_ones_are_not():
    for each in questions(DOCUMENTS, "continuation", 40, "items"):
        texts = DOCUMENTS[each["source"]]
        for index, option in enumerate(each["options"]):
            follows = any(each["context"] + option in text for text in texts)
            assert follows == (index == each["label"])
        assert len({option[0] for option in each["options"]}) == 1


def test_last_words_have_one_length():
    for each in questions(DOCUMENTS, "last_word", 40, "items"):
        assert len({len(option) for option in each["options"]}) == 1
        right = each["context"] + " " + each["options"][each["label"]]
        assert any(right in text for text in DOCUMENTS[each["source"]])


def test_word_orders_hold_the_same_words():
    for each in questions(DOCUMENTS, "word_order", 40, "items"):
        first, second = each["options"]
        assert sorted(first.split()) == sorted(second.split())


def test_demonstrations_come_from_other_stretches_than_questions():
    items = questions(DOCUMENTS, "last_word", 100, "items")
    pool = questions(DOCUMENTS, "last_word", 100, "pool")
    assert pool
    assert not {each["context"] for each in items} & {each["context"] for each in pool}
