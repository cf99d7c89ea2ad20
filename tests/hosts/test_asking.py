"""Two processes of four devices ask one model, and are told what one process is told."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cli.run_folder import make_run

pytestmark = pytest.mark.slow

WORDS = ["stone", "river", "light", "house", "green", "seven"]
PICK = 'data: {path: items.jsonl}\nprompt: "the {q} is"\noptions: o\nlabel: right\n'
SAY = (
    'data: {path: answers.jsonl}\nprompt: "the {q} is"\nanswers: ["{a}"]\nscorer: generate\n'
    "metrics: [em]\nbeam: 2\nmax_tokens: 3\n"
)
PICK_OF_LM_EVAL = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{q}}}}"
doc_to_target: right
doc_to_choice: "{{{{o}}}}"
metric_list: [{{metric: acc}}]
"""
# Kills the process at its first batch that is kept.
KILLED = """
import os, signal
from glamcli.evals.results.journal import Journal
add = Journal.add
def killed(self, key, found):
    add(self, key, found)
    os.kill(os.getpid(), signal.SIGKILL)
Journal.add = killed
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    asked = [
        {"q": word, "o": [WORDS[i - 1], WORDS[i - 2]], "right": i % 2, "a": WORDS[i - 1]}
        for i, word in enumerate(WORDS)
    ]
    text = "".join(json.dumps(each) + "\n" for each in asked)
    for name in ("items", "answers"):
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "pick.yaml").write_text(PICK)
    (folder / "say.yaml").write_text(SAY)
    (folder / "both.yaml").write_text("tasks: [pick, say]\nshots: [0]\n")
    return folder / "both.yaml"


HANGS = """
import time
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.generate import Generator
def hang(*arguments, **options):
    time.sleep(500)
Likelihoods.score = Generator.stream = Generator.beams = hang
"""


class Asking:
    """`glam` in as many processes as there are lists of words."""

    def __init__(self, *words: list[object], num_devices: int = 4, first: tuple[str, ...] = ()):
        """`first` is Python to run before the command, by process."""
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={num_devices}",
        }
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        self.processes = []
        for index, mine in enumerate(words):
            place = ("--coordinator", address, "--num-processes", len(words), "--process-id", index)
            before = first[index] if first else ""
            start = [sys.executable, "-c", f"{before}\nfrom glamcli.cli.main import run; run()"]
            self.processes.append(
                subprocess.Popen(
                    [str(each) for each in (*start, *mine, *(place if len(words) > 1 else ()))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )

    def ends(self, *given: str) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each; `given` to the first ones on stdin."""
        for process, text in zip(self.processes, given, strict=False):
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.close()
            process.stdin = None
        found = [each.communicate(timeout=500) for each in self.processes]
        codes = [each.returncode for each in self.processes]
        return [(code, *said) for code, said in zip(codes, found, strict=True)]


@pytest.fixture
def glam():
    """Starts processes, and ends those that a failed test left behind."""
    started = []

    def start(*words, **options) -> Asking:
        started.append(Asking(*words, **options))
        return started[-1]

    yield start
    for process in (each for asking in started for each in asking.processes):
        process.kill()
        process.communicate()


def kept(run: Path) -> list[dict]:
    text = (run / "eval" / "both-step3.items.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        ("mesh.expert=2", "mesh.model=2"),
        ("model.num_layers=4", "mesh.stage=2", "mesh.slice=2", "pipeline.microbatches=2"),
    ],
    ids=["expert and model", "slice and stage"],
)
def test_an_evaluation_that_was_killed_goes_on_and_scores_what_one_process_scores(
    glam, suite, tmp_path, settings
):
    run = make_run(tmp_path, "model.vocab_size=260", *settings)
    words = ["eval", run, "--suite", suite]
    (first, _, _), (other, _, err) = glam(words, words, first=(KILLED, "")).ends()
    assert first == -9
    assert other == 134
    assert f"error: process 0 ({socket.gethostname()}) is gone" in err
    ends = glam(words, words).ends()
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "continuing from 1 batches" in ends[0][2]
    assert ends[1][1] == ""
    together = kept(run)
    assert not list(run.glob("eval/unfinished-*"))
    (alone,) = glam(words, num_devices=1).ends()
    assert alone[:2] == ends[0][:2]
    assert len(together) == 2 * len(WORDS)
    for mine, theirs in zip(kept(run), together, strict=True):
        assert mine.keys() == theirs.keys()
        for option, other in zip(mine.get("options", ()), theirs.get("options", ()), strict=True):
            assert option.pop("score") == pytest.approx(other.pop("score"), rel=1e-5)
            assert option.pop("nats") == pytest.approx(other.pop("nats"), rel=1e-5)
        if "nats" in mine:
            assert mine.pop("nats") == pytest.approx(theirs.pop("nats"), rel=1e-5)
        assert mine == theirs


def test_a_file_that_one_machine_lacks_costs_its_task_and_no_other(glam, suite, tmp_path):
    run = make_run(tmp_path)
    for name in ("0", "1"):
        shutil.copytree(suite.parent, tmp_path / name)
    (tmp_path / "1" / "answers.jsonl").unlink()
    words = [["eval", run, "--suite", tmp_path / name / "both.yaml"] for name in ("0", "1")]
    ends = glam(*words).ends()
    assert [code for code, _, _ in ends] == [3, 3], ends
    what = f"task `say` was not scored: process 1 ({socket.gethostname()}): no file "
    assert what in ends[0][2]
    assert [line.split()[0] for line in ends[0][1].splitlines() if "accuracy" in line] == ["pick"]


def test_other_options_of_one_process_are_refused_by_all(glam, suite, tmp_path):
    run = make_run(tmp_path)
    words = ["eval", run, "--suite", suite, "--limit"]
    for code, out, err in glam([*words, 2], [*words, 3]).ends():
        assert (code, out) == (2, "")
        assert f"process 1 ({socket.gethostname()}): `--limit` is 3 there, 2 elsewhere" in err


@pytest.mark.parametrize("how", [("--samples", "2", "--top-p", "0.9"), ("--beam", "2")])
def test_lines_that_process_zero_reads_are_continued_as_by_one_process(glam, tmp_path, how):
    run = make_run(tmp_path, "model.vocab_size=260", "mesh.expert=2", "mesh.model=2")
    words = ["generate", run, "--tokens", "5", *how]
    lines = "stone river\nlight\n"
    ends = glam(words, words).ends(lines, "not read\n")
    assert [code for code, _, _ in ends] == [0, 0], ends
    (alone,) = glam(words, num_devices=1).ends(lines)
    assert ends[0][1] == alone[1]
    assert alone[1].count("stone river") == (2 if "--samples" in how else 1)
    assert ends[1][1] == ""


def test_tasks_of_lm_eval_are_scored_as_by_one_process(glam, tmp_path):
    run = make_run(tmp_path, "model.vocab_size=260", "mesh.expert=2", "mesh.model=2")
    items = [{"q": word, "o": ["yes", "no"], "right": i % 2} for i, word in enumerate(WORDS)]
    (tmp_path / "tasks").mkdir()
    path = tmp_path / "tasks" / "items.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in items))
    (tmp_path / "tasks" / "pick.yaml").write_text(PICK_OF_LM_EVAL.format(path=path))
    words = ["eval", run, "--harness", "pick", "--include-path", tmp_path / "tasks"]
    ends = glam(words, words).ends()
    assert [code for code, _, _ in ends] == [0, 0], ends
    (alone,) = glam(words, num_devices=1).ends()
    assert alone[0] == 0, alone
    assert ends[0][1] == alone[1]
    assert "pick" in alone[1]
    assert ends[1][1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_process_that_hangs_is_ended_with_its_stacks(glam, suite, tmp_path, command):
    run = make_run(tmp_path, "runtime.step_timeout_seconds=2")
    words = {
        "eval": ["eval", run, "--suite", suite],
        "generate": ["generate", run, "stone river", "--tokens", "5"],
    }[command]
    ends = glam(words, words, first=("", HANGS)).ends()
    assert ends[1][0] == 86, ends
    assert "got no further for 20 s, " in ends[1][2]
    assert "in hang" in ends[1][2]
    assert ends[0][0] in (86, 134), ends
