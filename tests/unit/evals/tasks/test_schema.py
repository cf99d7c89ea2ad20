import pytest

from glamcli.errors import RecipeError
from glamcli.evals.tasks.suites import _shipped_tasks, load_suite, shipped_suites

GOOD = 'data: {path: a.jsonl}\nprompt: "{q}"\noptions: [yes, no]\nlabel: label\n'


@pytest.mark.parametrize("name", sorted(shipped_suites()))
def test_every_shipped_suite_reads(name):
    suite = load_suite(name)
    assert suite.tasks
    assert [task.error for task in suite.tasks] == [None] * len(suite.tasks)


def test_every_shipped_task_is_a_suite_of_one():
    for name in _shipped_tasks():
        assert [task.name for task in load_suite(name).tasks] == [name]


def test_a_malformed_task_keeps_its_error_and_the_others_are_read(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(GOOD + "scoer: sum\n")
    (tmp_path / "suite.yaml").write_text("tasks: [good, bad.yaml, absent, piqa]\nshots: [0]\n")
    suite = load_suite(str(tmp_path / "suite.yaml"))
    good, bad, absent, piqa = suite.tasks
    assert good.error is None
    assert piqa.error is None
    assert good.task is not None
    assert good.task.options == ("yes", "no")
    assert bad.error is not None
    assert "bad.yaml:5" in str(bad.error)
    assert "scoer" in str(bad.error)
    assert absent.error is not None
    assert "absent" in absent.error.what
    assert suite.settings.shots == (0,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD.replace("label: label\n", ""), "needs `label`"),
        (GOOD + "answers: a\n", "does not use `answers`"),
        (GOOD + "metrics: [f1]\n", "metric `f1`"),
        (GOOD + "labels: [1, 2, 3]\n", "3 `labels` for 2 options"),
        (GOOD + "shots: {source: pool}\n", "`shots.data`"),
        (GOOD.replace("{q}", "{q"), "single `{`"),
        (GOOD.replace("path: a.jsonl", "kind: tfds, path: a"), "needs `split`"),
        (GOOD.replace("path: a.jsonl", "kind: heldout"), "needs `build`"),
        (GOOD + "scorer: generate\n", "generate"),
        (GOOD + "metrics: [f1a]\n", "metric `f1a`"),
        (GOOD + "right: r\n", "does not use `label`"),
        (GOOD + "with_shots: {promt: x}\n", "task.yaml:5: unknown key `promt`"),
        (GOOD + "presets: {gpt3: {scorer: summ}}\n", "task.yaml:5: `scorer`"),
        (GOOD + "presets: {glam: {scorer: sum}}\n", "preset `glam`"),
        (GOOD + "presets: [gpt3]\n", "`presets` must be a section"),
        (GOOD.replace("path: a.jsonl", "path: a.jsonl, fields: {a: 1b}"), "not a field path"),
    ],
)
def test_contradictions_are_named_with_the_file(tmp_path, text, reason):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    (task,) = load_suite(str(path)).tasks
    assert task.error is not None
    assert reason in str(task.error)
    assert "task.yaml" in str(task.error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "answers: Answers\n",
         "5: a task with scorer `per_token` does not use `answers`"),
        (GOOD.replace("label: label", "scorer: sum"),
         "4: a task with scorer `sum` needs `label`"),
        (GOOD.replace("label: label\n", ""), "3: a task with scorer `per_token` needs `label`"),
        (GOOD + "metrics: [accuracy, f1]\n",
         "5: metric `f1` does not go with scorer `per_token`"),
        (GOOD + "labels: [1, 2, 3]\n", "5: 3 `labels` for 2 options"),
        (GOOD + "shots: {source: pool}\n",
         "5: `shots.source` is `pool`, so `shots.data` must name the pool"),
        (GOOD.replace("{q}", "{Q|LOWR}"), "2: `prompt`: unknown filter `LOWR`"),
        (GOOD.replace("[yes, no]", "['{a', no]"),
         "3: `options`: single `{` in template; write `{{` for the character"),
        (GOOD.replace("label: label", "label: No Path"),
         "4: `label`: `No Path` is not a field path such as `question` or `answers.text.0`"),
        (GOOD.replace("{path: a.jsonl}", "\n  kind: tfds\n  path: A"),
         "2: data of kind `tfds` needs `split`"),
        (GOOD.replace("{path: a.jsonl}", "\n  path: A\n  split: B"),
         "3: data of kind `jsonl` does not use `split`"),
        (GOOD.replace("{path: a.jsonl}", "\n  path: A\n  fields:\n    X: 1B"),
         "4: `data.fields.X`: `1B` is not a field path such as `question` or `answers.text.0`"),
        (GOOD + "shots: {data: {path: Pool, each: 7}}\n",
         "5: `shots.data.each` must be a list such as `[1, 2]`, not `7`"),
        (GOOD + "labels: 'A B'\n",
         "5: `labels`: `A B` is not a field path such as `question` or `answers.text.0`"),
        (GOOD + "classes: [yes, no]\n",
         "5: `classes` needs scorer `generate`: options are classes"),
    ],
)  # fmt: skip
def test_messages_say_what_is_wrong_at_the_line_of_the_key(tmp_path, text, message):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    (task,) = load_suite(str(path)).tasks
    assert task.error is not None
    assert task.error.what == f"{path}:{message}"


def test_an_unknown_suite_suggests_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match="qick") as caught:
        load_suite("qick")
    assert caught.value.hint == "did you mean `quick`?"
    (tmp_path / "empty.yaml").write_text("tasks: []\n")
    with pytest.raises(RecipeError, match="tasks"):
        load_suite(str(tmp_path / "empty.yaml"))


def test_changes_for_demonstrations_and_presets_are_merged_and_null_takes_a_key_back(tmp_path):
    (tmp_path / "task.yaml").write_text(
        GOOD
        + "shots: {few: 7, draw: fixed}\nwith_shots: {prompt: 'Q: {q}'}\n"
        + "presets:\n"
        + "  gpt3: {options: null, label: null, answers: a, scorer: generate, shots: {few: 9}}\n"
        + "  other: {with_shots: {prompt: null, contexts: ['{a}', '{b}'], options: null,"
        + " continuation: c}}\n"
    )
    (glam,) = load_suite(str(tmp_path / "task.yaml")).tasks
    assert (glam.at(0).prompt, glam.at(2).prompt) == ("{q}", "Q: {q}")
    assert glam.presets == ("gpt3", "other")
    (gpt3,) = load_suite(str(tmp_path / "task.yaml"), "gpt3").tasks
    assert gpt3.at(0).answers == "a"
    assert gpt3.at(1).prompt == "Q: {q}"
    assert (gpt3.at(1).shots.few, gpt3.at(1).shots.draw) == (9, "fixed")
    (other,) = load_suite(str(tmp_path / "task.yaml"), "other").tasks
    assert other.at(0).prompt == "{q}"
    assert other.at(1).contexts == ("{a}", "{b}")


def test_a_preset_that_no_task_has_is_refused():
    with pytest.raises(RecipeError, match="preset `gpt4`") as caught:
        load_suite("glam29", "gpt4")
    assert "`gpt3`" in (caught.value.hint or "")


def test_averages_name_tasks_of_the_suite(tmp_path):
    text = "tasks: [piqa, copa]\naverages: {all: [piqa, rte/f1]}\n"
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(RecipeError, match="`rte/f1`, no task of this suite"):
        load_suite(str(tmp_path / "suite.yaml"))
