"""Real items of eight public datasets, where they lie beside the checkout (or GLAM_EVAL_DATA)."""

import os
from pathlib import Path

import pytest

from glamcli.evals import prompts
from glamcli.evals.files import load_suite
from glamcli.evals.items import Library
from glamcli.evals.question import ask

BESIDE = Path(__file__).resolve().parents[4] / "shared" / "eval_data"
FOLDER = Path(os.environ.get("GLAM_EVAL_DATA", BESIDE))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER}")
# Task: items, and a text every prompt or answer of the first item must show.
TASKS = {
    "piqa": 300,
    "copa": 100,
    "boolq": 300,
    "hellaswag": 300,
    "winograd": 273,
    "lambada": 300,
    "nq_open": 300,
    "squad_v2": 300,
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("preset", ["glam", "gpt3"])
def test_real_items_are_asked_behind_as_many_demonstrations_as_the_paper(name, preset):
    (file,) = [each for each in load_suite("glam29", preset).tasks if each.name == name]
    task, library = file.with_shots, Library(FOLDER)
    items = library.items(task, file.path)
    questions = [ask(task, item) for item in items]
    assert len(questions) == TASKS[name]
    pool = prompts.Pool(task, library.pool(task, file.path, items))
    count = min(task.shots.few, 30)  # copa's pool has 32 items
    for question in questions[::25]:
        drawn = prompts.draw(task, name, question, pool, count, seed=0)
        assert len({each.key for each in drawn}) == count
        assert question.key not in {each.key for each in drawn}
        made = prompts.assemble(task, question, drawn, lambda text: True)
        assert made.shots == count
        assert made.contexts[0].endswith(question.contexts[0])


def test_the_share_of_right_positions_is_what_the_files_hold():
    file = next(each for each in load_suite("glam29").tasks if each.name == "winograd")
    items = Library(FOLDER).items(file.task, file.path)
    gold = [ask(file.task, item).gold for item in items]
    assert (gold.count(0), gold.count(1)) == (137, 136)


def test_squads_unanswerable_questions_expect_the_stated_text():
    file = next(each for each in load_suite("glam29").tasks if each.name == "squad_v2")
    questions = [ask(file.task, item) for item in Library(FOLDER).items(file.task, file.path)]
    without = [each for each in questions if each.answers == ("unanswerable",)]
    assert len(without) == sum(each.by == ("True",) for each in questions)
    assert 0.5 < len(without) / len(questions) < 0.65
