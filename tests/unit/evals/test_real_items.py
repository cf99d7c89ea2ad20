"""Real items of eight public datasets, where they lie beside the checkout (or GLAM_EVAL_DATA)."""

import json
import os
from pathlib import Path

import pytest

from cli.run_folder import make_run
from glamcli.cli import main
from glamcli.evals.asking import prompts
from glamcli.evals.asking.question import ask
from glamcli.evals.tasks.items import Library
from glamcli.evals.tasks.suites import load_suite

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


NAME = "copa-shots0-limit20-step3.items.jsonl"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("preset", ["glam", "gpt3"])
def test_real_items_are_asked_behind_as_many_demonstrations_as_the_paper(name, preset):
    (file,) = [each for each in load_suite("glam29", preset).tasks if each.name == name]
    task, library = file.with_shots, Library(FOLDER)
    items = library.items(task, file.path)
    questions = [ask(task, item) for item in items]
    assert len(questions) == TASKS[name]
    pool = prompts._Pool(task, library.pool(task, file.path, items))
    count = min(task.shots.few, 30)  # copa's pool has 32 items
    for question in questions[::25]:
        drawn = prompts._draw(task, name, question, pool, count, seed=0)
        assert len({each.key for each in drawn}) == count
        assert question.key not in {each.key for each in drawn}
        made = prompts._assemble(task, question, drawn, lambda text: True)
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


@pytest.mark.slow
def test_items_in_the_training_text_are_found_and_scored_apart(tmp_path, capsys):
    """Some items of COPA stand in the text that a run was trained on, in the middle of other."""
    lines = (FOLDER / "copa.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    items = [json.loads(line) for line in lines]
    planted = [2, 5, 11, 17]
    noise = [" ".join(f"w{(i * 7 + j * j) % 97}" for j in range(40)) for i in range(60)]
    for index in planted:
        item = items[index]
        text = item["premise"][:-1] + {"cause": " because ", "effect": " so "}[item["question"]]
        text += item["choice2" if item["label"] else "choice1"]
        noise[3 * index] += f" {text.upper()} {noise[3 * index]}"
    (tmp_path / "texts.txt").write_text("\n".join(noise))
    source = f"{{kind: text, path: {tmp_path}/texts.txt, separator: line, weight: 1}}"
    (tmp_path / "dirty.yaml").write_text(f"sources: {{noise: {source}}}\nheldout_frac: 0.01\n")
    run = make_run(tmp_path, f"data.mixture={tmp_path}/dirty.yaml")

    def told(*args):
        given = ["--suite", "copa", "--data-dir", str(FOLDER), "--limit", "20", "--json"]
        with pytest.raises(SystemExit) as caught:
            main.run(["eval", *map(str, args), *given])
        out, err = capsys.readouterr()
        assert caught.value.code in (0, None), err
        (found,) = [each for each in map(json.loads, out.splitlines()) if "suite" in each]
        return found

    told(run, "--shots", "0")
    of_run, of_mixture = told("overlap", run), told("overlap", tmp_path / "dirty.yaml")
    (found,) = of_run["overlap"]
    assert found == of_mixture["overlap"][0]
    library = Library(FOLDER)
    (file,) = load_suite("copa").tasks
    keys = [each.key for each in library.items(file.task, file.path)]
    assert found["dirty"] == [keys[index] for index in planted]
    (split,) = of_run["scores"]
    assert (split["num_clean"], split["num_dirty"]) == (16, 4)
    whole = (16 * split["clean"] + 4 * split["dirty"]) / 20
    assert split["all"] == pytest.approx(whole)
    records = [json.loads(line) for line in (run / "eval" / NAME).read_text().splitlines()]
    right = [record["accuracy"] for record in records if record["key"] in found["dirty"]]
    assert split["dirty"] == pytest.approx(sum(right) / 4)
    assert of_mixture["scores"] == []
