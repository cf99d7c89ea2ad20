"""`glam eval` as a person meets it."""

import json
import runpy
import shutil
import sys
from functools import partial

import pytest

import glamcli
from cli.run_folder import make_run
from glamcli.evals.results.store import keep_harness
from glamcli.progress import Silent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("eval"))


@pytest.fixture
def glam(glam, tmp_path, monkeypatch):
    """Runs `glam eval` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(glam, "eval")


def test_the_quick_suite_is_scored_beside_its_baselines_and_kept(glam, run):
    code, out, err = glam(run, "--shots", "0,1", "--limit", "4")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if "accuracy" in line]
    assert [(row[0], row[1]) for row in rows] == [
        (task, shots)
        for task in ("true_continuation", "last_word", "word_order")
        for shots in ("0", "1")
    ]
    assert "random" in out
    assert "step 3" in out
    kept = json.loads((run / "eval" / "quick-shots0,1-limit4-step3.json").read_text())
    assert kept["model"]["dispatch"] == "dropless"
    assert kept["model"]["recipe_hash"]
    assert len(kept["model"]["params_digest"]) == 64
    random = [score["measured"][0]["baselines"]["random"] for score in kept["scores"]]
    assert random == [0.25, 0.25, 0.25, 0.25, 0.5, 0.5]
    items = (run / "eval" / "quick-shots0,1-limit4-step3.items.jsonl").read_text().splitlines()
    assert len(items) == 6 * 4
    assert str(run / "eval" / "quick-shots0,1-limit4-step3.json") in err
    code, shown, _ = glam("show", run)
    assert code == 0
    assert shown.startswith(out.rstrip("\n"))
    assert f"weights {kept['model']['params_digest'][:16]}" in shown


def test_a_bare_checkpoint_is_scored_on_what_can_be_read_and_the_exit_code_tells(
    glam, run, tmp_path
):
    items = '{"q": "stone", "o": ["river", "light"], "right": "b"}\n' * 3
    (tmp_path / "good.jsonl").write_text(items)
    (tmp_path / "bad.jsonl").write_text('{"q": "stone"\n')
    good = 'data: {path: good.jsonl}\nprompt: "{q}"\noptions: o\nlabel: right\nlabels: [a, b]\n'
    (tmp_path / "good.yaml").write_text(good)
    (tmp_path / "bad.yaml").write_text(good.replace("good.jsonl", "bad.jsonl"))
    (tmp_path / "suite.yaml").write_text("tasks: [bad, good]\nshots: [0]\n")
    shutil.copytree(run / "checkpoints" / "3", tmp_path / "3")
    code, out, _ = glam(tmp_path / "3", "--suite", "suite.yaml", "--json")
    assert code == 3
    events = [json.loads(line) for line in out.splitlines()]  # one object per line, warnings too
    (found,) = [event for event in events if event["event"] == "eval"]
    assert [score["task"] for score in found["scores"]] == ["good"]
    assert found["scores"][0]["num_items"] == 3
    assert found["scores"][0]["measured"][0]["baselines"]["position"] == 1
    (warning,) = [event["text"] for event in events if event["event"] == "warn"]
    assert "task `bad` was not scored" in warning
    assert "bad.jsonl:1: not JSON" in warning


def test_a_finished_suite_leaves_nothing_to_go_on_from_whatever_it_lacked(glam, run, tmp_path):
    (tmp_path / "suite.yaml").write_text("tasks: [last_word, absent.yaml]\nshots: [0]\n")
    for _ in range(2):
        code, _, err = glam(run, "--suite", "suite.yaml", "--limit", "2")
        assert code == 3
        assert "going on" not in err
        assert not list((run / "eval").glob("unfinished-*"))


CHOICE = 'prompt: "{q}"\noptions: o\nlabel: right\n'
GOOD = '{"q": "stone", "o": ["river", "light"], "right": 1}'
# What is wrong: changes to the task file, the second line of its data, and what has to be said.
BAD = {
    "key": ("scoer: sum\n", GOOD, "key.yaml:5: unknown key `scoer`"),
    "yaml": ("prompt: [\n", GOOD, "yaml.yaml:"),
    "field": ("", '{"q": "stone", "o": ["a", "b"]}', "field.jsonl:2: no field `right`"),
    "count": ("num_options: 2\n", GOOD.replace("]", ', "sun"]'), "count.jsonl:2: 3 options"),
    "labels": (
        "labels: names\n",
        '{"q": "a", "o": ["b", "c"], "names": ["x"], "right": "x"}',
        "labels.jsonl:2: `names` has 1 entries for 2 options",
    ),
    "index": ("", GOOD.replace("1}", "2}"), "index.jsonl:2: `right` is 2, with 2 options"),
    "below": ("", GOOD.replace("1}", "-1}"), "below.jsonl:2: `right` is -1, with 2 options"),
    "bytes": ("", GOOD.replace("stone", "\udcff"), "bytes.jsonl:2: not UTF-8"),
    "kind": ("", GOOD.replace('"stone"', '["s"]'), "kind.jsonl:2: `q` is list, not text"),
    "empty": ("", None, "empty.jsonl: no items"),
    "absent": ("", "", "no file "),
}


def test_one_bad_task_after_another_is_told_with_its_line_and_the_good_one_is_scored(
    glam, run, tmp_path
):
    for name, (settings, line, _) in BAD.items():
        task = f"data: {{path: {name}.jsonl}}\n{CHOICE}{settings}"
        (tmp_path / f"{name}.yaml").write_text(task)
        first = GOOD.replace("1}", '"x", "names": ["x", "y"]}') if name == "labels" else GOOD
        lines = "" if line is None else f"{first}\n{line}\n"
        if name != "absent":
            (tmp_path / f"{name}.jsonl").write_bytes(lines.encode("utf-8", "surrogateescape"))
    (tmp_path / "good.jsonl").write_text(GOOD + "\n")
    (tmp_path / "good.yaml").write_text("data: {path: good.jsonl}\n" + CHOICE)
    (tmp_path / "suite.yaml").write_text(f"tasks: [{', '.join(BAD)}, good]\nshots: [0]\n")
    code, out, err = glam(run, "--suite", "suite.yaml")
    assert code == 3
    assert [line.split()[0] for line in out.splitlines() if "accuracy" in line] == ["good"]
    told = err.replace(f"{tmp_path}/", "")
    for name, (_, _, reason) in BAD.items():
        (line,) = [each for each in told.splitlines() if f"task `{name}` was not scored" in each]
        assert reason in line
    assert "Traceback" not in err
    assert list((run / "eval").glob("unfinished-*")) == []  # it is finished, failures and all


def test_what_data_is_there_and_what_is_missing_is_told_and_made_of_what_a_person_has(
    glam, tmp_path
):
    given = tmp_path / "given" / "COPA"
    given.mkdir(parents=True)
    copa = {"premise": "He ran.", "choice1": "A", "choice2": "B", "question": "cause", "label": 0}
    for name in ("train", "val"):
        (given / f"{name}.jsonl").write_text(json.dumps(copa) + "\n")
    (tmp_path / "suite.yaml").write_text("tasks: [copa, coqa, word_order]\n")
    where = ["data", "suite.yaml", "--data-dir", "here", "--offline"]
    code, out, _ = glam(*where)
    assert code == 3
    rows = [line.split() for line in out.splitlines()[2:5]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("copa", "missing"),
        ("coqa", "missing"),
        ("word_order", "ready"),
    ]
    assert "no here/coqa.shots.jsonl (demonstrations)" in out
    assert "from `coqa-train-v1.0.json` of https://" in out
    assert "each line is a JSON object with `choice1`, `choice2`, `label`, `premise`" in out
    code, out, err = glam(*where, "--from", "given")
    assert code == 3
    assert "here/copa.jsonl: 1 records" in err
    assert out.splitlines()[2].split() == ["copa", "1", "1", "ready"]
    (tmp_path / "here" / "copa.jsonl").write_text('{"premise": "x"}\n')
    assert "here/copa.jsonl:1: no field" in glam("data", "copa", "--data-dir", "here")[1]


def test_an_item_is_explained_token_by_token_with_control_characters_escaped(glam, run, tmp_path):
    item = {"q": "\x1b[31mred", "o": ["\x07a", "b"], "right": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "task.yaml").write_text(
        'data: {path: q.jsonl}\nprompt: "{q}"\noptions: o\nlabel: right\n'
    )
    code, out, _ = glam(run, "--suite", "task.yaml", "--explain", "0", "--shots", "0")
    assert code == 0
    assert "task item 0 (q.jsonl:1), 0 shots" in out.replace(f"{tmp_path}/", "")
    assert out.count("nats over") == 2
    assert "\\x1b[31mred" in out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert not (run / "eval" / "task-step3.json").exists()


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["nowhere"], 4, "no run folder or checkpoint nowhere"),
        (["file"], 4, "file is a file"),
        (["empty"], 4, "no complete checkpoint"),
        (["RUN", "--suite", "quik"], 2, "did you mean `quick`"),
        (["RUN", "--shots", "0,x"], 2, "--shots"),
        (["RUN", "--explain", "last_word"], 2, "--explain"),
        (["RUN", "--explain", "nothing:1"], 2, "no task `nothing`"),
        (["RUN", "--explain", "1"], 2, "TASK:N"),
        (["RUN", "--suite", "piqa", "--shots", "0"], 3, "--data-dir"),
        (["RUN", "--suite", "local8", "--data-dir", "empty"], 3, "not scored: piqa, copa, boolq,"),
        (["RUN", "--include-path", "empty"], 2, "--harness"),
        (["shwo", "a"], 2, "did you mean `glam eval show`"),
        (["./show"], 4, "no run folder or checkpoint show"),
        (["show", "empty"], 2, "no results of `glam eval` in empty"),
        (["show", "file"], 3, "file holds no results of `glam eval`"),
    ],
)
def test_mistakes_are_told_in_a_line(glam, run, tmp_path, args, code, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    found, out, err = glam(*[run if arg == "RUN" else arg for arg in args])
    assert found == code
    assert reason in err
    assert "Traceback" not in err
    assert out == ""


def test_a_folder_of_runs_is_told_apart_and_one_of_them_suggested(glam, run):
    assert glam(run.parent) == (
        4,
        "",
        f"error: {run.parent} is a folder of runs, not a run\nhint: for example {run}\n",
    )


def test_lm_evals_tasks_need_an_extra_that_one_line_names(glam, run, monkeypatch):
    # Its parts too: another test may have loaded them.
    for name in {"lm_eval", *(name for name in sys.modules if name.startswith("lm_eval."))}:
        monkeypatch.setitem(sys.modules, name, None)
    for package in ("glamcli.cli", "glamcli.evals"):
        monkeypatch.delitem(sys.modules, f"{package}.harness", raising=False)
        monkeypatch.delattr(sys.modules[package], "harness", raising=False)
    code, _, err = glam(run, "--harness", "piqa")
    assert code == 2, err
    assert "error: lm-eval is not installed" in err
    assert "glamcli[harness]" in err


def test_lm_evals_tasks_are_scored_and_kept(glam, run, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra [harness]")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    items = '{"q": "stone", "o": ["river", "light"], "right": 1}\n' * 3
    (tmp_path / "items.jsonl").write_text(items)
    (tmp_path / "small.yaml").write_text(
        "task: small\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{validation: {tmp_path}/items.jsonl}}}}\n"
        "validation_split: validation\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{o}}'\n"
        "doc_to_target: right\nmetric_list: [{metric: acc}]\n"
    )
    code, out, err = glam(run, "--harness", "small", "--include-path", tmp_path, "--json")
    assert code == 0, err
    (found,) = [each for each in map(json.loads, out.splitlines()) if each["event"] == "harness"]
    assert found["results"]["small"]["acc,none"] in (0.0, 1.0)
    assert found["config"]["glam"]["step"] == 3
    kept = (run / "eval" / "harness" / "small-step3.items.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc"]["q"] for line in kept] == ["stone"] * 3
    code, _, err = glam(run, "--harness", "small", "--include-path", tmp_path, "--shots", "0,1")
    assert code == 2
    assert "one number of shots" in err


def test_lm_evals_own_command_tells_an_error_in_a_line(monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs the extra [harness]")
    from glamcli.evals import harness

    monkeypatch.setattr(harness, "command_line", lambda model: glamcli.open("gs://bucket"))
    monkeypatch.delitem(sys.modules, "glamcli.cli.harness", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("glamcli.cli.harness", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().err.split(":")[0]) == (2, "error")


def test_lm_evals_results_replace_those_of_the_same_items_only(tmp_path):
    for item, weights in (("stone", "a"), ("sand", "a"), ("stone", "a"), ("stone", "b")):
        config = {"glam": {"params_digest": weights}}
        results = {"configs": {"t": {"task": "t"}}, "task_hashes": {"t": item}, "config": config}
        keep_harness(results, [{"task": "t", "doc": item}], tmp_path, "t-step3", Silent())
    folder = tmp_path / "eval" / "harness"
    made = {each.name: json.loads(each.read_text()) for each in folder.iterdir()}
    assert sorted(made) == [
        "t-step3-2.items.jsonl", "t-step3-2.json", "t-step3-3.items.jsonl", "t-step3-3.json",
        "t-step3.items.jsonl", "t-step3.json",
    ]  # fmt: skip
    assert made["t-step3.items.jsonl"] == {"task": "t", "doc": "stone"}
    assert made["t-step3.json"]["config"] == {"glam": {"params_digest": "a"}}
    assert made["t-step3-2.json"]["task_hashes"] == {"t": "sand"}


@pytest.mark.slow
def test_continuations_are_scored_by_a_command_and_never_replaced_by_others(glam, run, tmp_path):
    prompts = [{"prompt": {"text": text, "toxicity": value}} for text, value in
               (("stone", 0.1), ("river", 0.9))]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    scorer = "import sys\nfor line in sys.stdin: print('{\"score\": %s}')\n"
    for name, score in (("half.py", 0.5), ("none.py", 0)):
        (tmp_path / name).write_text(scorer % score)

    def told(*args, by="half.py"):
        asked = ["--prompts", "prompts.jsonl", "--scorer", f"{sys.executable} {by}", "--json"]
        code, out, err = glam("toxicity", run, *asked, "--tokens", "4", *args)
        assert code == 0, err
        (found,) = [e for e in map(json.loads, out.splitlines()) if e["event"] == "toxicity"]
        return {each["name"]: each["expected_max"] for each in found["buckets"]}

    folder = run / "bias"
    found = told("--samples", "2")
    (kept,) = folder.glob("*.texts.jsonl")
    texts = kept.read_text()
    assert max(found.values()) == 0.5
    told("--samples", "3")
    assert max(told("--samples", "2", by="none.py").values()) == 0
    assert kept.read_text() == texts
    assert sorted(each.name for each in folder.glob("*.json")) == [
        "step3-toxicity-samples2-tokens4-2.json",
        "step3-toxicity-samples2-tokens4.json",
        "step3-toxicity-samples3-tokens4.json",
    ]


def test_a_changed_tokenizer_is_refused(glam, run, monkeypatch):
    from glamcli.data.tokenizer import Bytes

    monkeypatch.setattr(Bytes, "fingerprint", "0" * 64)
    code, _, err = glam(run)
    assert code == 4
    assert "tokenizer is not the one" in err
