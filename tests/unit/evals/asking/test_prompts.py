import pytest

from glamcli.errors import DataError
from glamcli.evals.asking import prompts
from glamcli.evals.asking.question import ask
from glamcli.evals.tasks.items import Item
from glamcli.evals.tasks.schema import Task

CHOICE = Task.model_validate(
    {
        "data": {"path": "a.jsonl"},
        "prompt": "{q}",
        "options": "options",
        "label": "label",
        "shots": {"separator": "\n"},
    }
)
ITEMS = [
    Item({"q": f"Q{i}:", "options": [f"a{i}", f"b{i}"], "label": i % 2}, f"a.jsonl:{i}")
    for i in range(12)
]
QUESTIONS = [ask(CHOICE, item) for item in ITEMS]


def test_options_follow_the_prompt_and_own_the_delimiter():
    asked = QUESTIONS[1]
    assert asked.contexts == ("Q1:", "Q1:")
    assert asked.continuations == (" a1", " b1")
    assert asked.demonstration(" ") == "Q1: b1"


def test_partial_scoring_has_one_context_per_option():
    task = Task.model_validate(
        {
            "data": {"path": "w.jsonl"},
            "contexts": ["{t|before:_}{x}", "{t|before:_}{y}"],
            "continuation": "{t|after:_}",
            "delimiter": "",
            "label": "label",
        }
    )
    item = Item({"t": "Ann said _ left.", "x": "he", "y": "she", "label": 1}, "w.jsonl:1")
    asked = ask(task, item)
    assert asked.contexts == ("Ann said he", "Ann said she")
    assert asked.continuations == (" left.", " left.")
    assert asked.demonstration("") == "Ann said she left."


@pytest.mark.parametrize(
    ("labels", "value", "gold"),
    [
        (None, 1, 1),
        (None, True, 1),
        (["n", "y"], "y", 1),
        ([2, 1], 1, 1),
        ([False, True], False, 0),
    ],
)
def test_labels_are_indices_booleans_or_listed_values(labels, value, gold):
    task = CHOICE.model_copy(update={"labels": labels and tuple(labels)})
    item = Item({**ITEMS[0].fields, "label": value}, "a.jsonl:1")
    assert ask(task, item).gold == gold


@pytest.mark.parametrize(
    ("labels", "value"), [(None, 2), (None, -1), (None, "a"), (["n", "y"], "z"), ([0, 1], True)]
)
def test_a_label_that_names_no_option_is_refused_with_its_line(labels, value):
    task = CHOICE.model_copy(update={"labels": labels and tuple(labels)})
    item = Item({**ITEMS[0].fields, "label": value}, "a.jsonl:9")
    with pytest.raises(DataError, match=r"a\.jsonl:9"):
        ask(task, item)


def test_right_options_may_be_spelt_otherwise_and_demonstrations_show_the_exact_one():
    task = Task.model_validate(
        {"data": {"path": "r.jsonl"}, "prompt": "{q}", "options": "names", "right": "right"}
    )
    names = ["TRUMP", "the Trump", "Trump", "Trump Tower"]
    item = Item({"q": "Who?", "names": names, "right": ["Trump"]}, "r.jsonl:1")
    assert ask(task, item).accepted == (2, 0, 1)


def test_equal_options_are_noticed():
    twice = Item({"q": "Q:", "options": ["a", "a"], "label": 0}, "a.jsonl:1")
    assert ask(CHOICE, twice).has_equal_options
    assert not QUESTIONS[0].has_equal_options


def test_unanswerable_items_expect_the_stated_text():
    task = Task.model_validate(
        {
            "data": {"path": "s.jsonl"},
            "prompt": "{q}",
            "answers": "answers.text",
            "no_answer": "unanswerable",
            "scorer": "generate",
        }
    )
    item = Item({"q": "Q?", "answers": {"text": []}}, "s.jsonl:1")
    assert ask(task, item).answers == ("unanswerable",)
    with pytest.raises(DataError, match="no accepted answer"):
        ask(task.model_copy(update={"no_answer": None}), item)


def test_shots_never_hold_the_item_and_fewer_shots_are_a_prefix_of_more():
    for asked in QUESTIONS:
        drawn = prompts._draw(CHOICE, "t", asked, QUESTIONS, 11, seed=3)
        assert asked not in drawn
        assert len({shot.key for shot in drawn}) == 11
        for shots in (0, 1, 5):
            assert prompts._draw(CHOICE, "t", asked, QUESTIONS, shots, seed=3) == drawn[:shots]


@pytest.mark.parametrize("words", ["Q0:", "q0:  "])
def test_the_item_is_recognised_under_another_id_and_spelling(words):
    twin = Item({**ITEMS[0].fields, "q": words, "id": 99}, "b.jsonl:1")
    pool = [ask(CHOICE, twin), QUESTIONS[1]]
    assert prompts._draw(CHOICE, "t", QUESTIONS[0], pool, 1, seed=0) == [QUESTIONS[1]]


def test_draws_depend_on_seed_and_item_but_not_on_order_or_limit():
    first = prompts._draw(CHOICE, "t", QUESTIONS[0], QUESTIONS, 5, seed=0)
    assert first == prompts._draw(CHOICE, "t", QUESTIONS[0], QUESTIONS, 5, seed=0)
    assert first != prompts._draw(CHOICE, "t", QUESTIONS[0], QUESTIONS, 5, seed=1)
    assert first != prompts._draw(CHOICE, "t", QUESTIONS[1], QUESTIONS, 5, seed=0)


def test_a_fixed_draw_is_the_same_for_every_item():
    shots = CHOICE.shots.model_copy(update={"draw": "fixed"})
    task = CHOICE.model_copy(update={"shots": shots})
    pool, asked = QUESTIONS[:8], QUESTIONS[8:]
    draws = [prompts._draw(task, "t", each, pool, 4, seed=0) for each in asked]
    assert all(draw == draws[0] for draw in draws)


def test_too_many_shots_are_refused():
    with pytest.raises(DataError, match="11 demonstrations"):
        prompts._draw(CHOICE, "t", QUESTIONS[0], QUESTIONS, 12, seed=0)


@pytest.mark.parametrize("limit", range(5, 60, 3))
def test_the_farthest_shots_are_dropped_until_the_prompt_fits(limit):
    shots = QUESTIONS[1:6]
    made = prompts._assemble(CHOICE, QUESTIONS[0], shots, lambda text: len(text) <= limit)
    whole = "".join(shot.demonstration(" ") + "\n" for shot in shots) + "Q0:"
    assert whole.endswith(made.contexts[0])
    assert made.shots == made.contexts[0].count("\n")
    longest = len(made.contexts[0]) + len(" a0")
    assert longest <= limit or made.shots == 0
    if made.shots < 5:  # one more would not have fitted
        assert longest + len("Q1: a1\n") > limit


def test_the_header_stands_once_before_the_first_demonstration():
    task = CHOICE.model_copy(update={"header": "Quiz.\n"})
    made = prompts._assemble(task, QUESTIONS[0], QUESTIONS[1:3], lambda text: True)
    assert made.contexts[0] == "Quiz.\nQ1: b1\nQ2: a2\nQ0:"
    assert prompts._assemble(task, QUESTIONS[0], [], lambda text: True).contexts[0] == "Quiz.\nQ0:"


def test_no_shots_is_the_question_alone():
    made = prompts._assemble(CHOICE, QUESTIONS[0], [], lambda text: True)
    assert made.contexts == ("Q0:", "Q0:")
