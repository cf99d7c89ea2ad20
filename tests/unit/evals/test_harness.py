"""The same local task by `glam eval` and by lm-eval: equal log-likelihoods item by item."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra [harness]")
# Read when its libraries are imported: nothing may be asked of the network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

from glamcli.errors import DataError, RecipeError
from glamcli.evals.harness import HarnessModel, _rolling, run_tasks
from glamcli.evals.run import evaluate
from glamcli.evals.scoring.likelihoods import Likelihoods
from glamcli.evals.tasks.suites import load_suite
from glamcli.progress import Silent

OURS = """
data: {path: items.jsonl}
prompt: "{q}"
options: options
label: label
scorer: sum
"""
OURS_FREE = """
data: {path: items.jsonl}
prompt: "{q}"
answers: options
scorer: generate
metrics: [em]
max_tokens: 6
beam: 1
stop: ["e"]
"""
THEIRS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: {kind}
validation_split: validation
doc_to_text: "{{{{q}}}}"
doc_to_target: {target}
{more}
"""
CHOICES = 'doc_to_choice: "{{options}}"\nmetric_list: [{metric: acc}]'
UNTIL = (
    "generation_kwargs: {until: ['e'], max_gen_toks: 6, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]"
)
ITEMS = [
    {"q": "Number 3 is", "options": ["even", "odd number"], "label": 1},
    {"q": "A blank behind: ", "options": ["one", "two words"], "label": 0},  # moves to the options
    {"q": "A line\n", "options": ["a", "b"], "label": 0},
    {"q": "long " * 60, "options": ["is cut", "alike for both"], "label": 1},  # of 300 tokens
    {"q": "The river and the old stone house were", "options": ["x", "yy", "zzz"], "label": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("harness")
    os.environ["HF_HOME"] = str(made / "cache")
    items = made / "items.jsonl"
    items.write_text("".join(json.dumps(each) + "\n" for each in ITEMS))
    (made / "ours.yaml").write_text(OURS)
    (made / "free.yaml").write_text(OURS_FREE)
    theirs = {
        "choose": ("multiple_choice", "label", CHOICES),
        "say": ("generate_until", "label", UNTIL),
    }
    for name, (kind, target, more) in theirs.items():
        text = THEIRS.format(name=name, path=items, kind=kind, target=target, more=more)
        (made / f"lm_eval_{name}.yaml").write_text(text)
    return made


@pytest.fixture(scope="module")
def samples(subject, folder):
    results = run_tasks(HarnessModel(subject), ["choose", "say"], include_path=folder)
    return {
        task: sorted(some, key=lambda each: each["doc_id"])
        for task, some in results["samples"].items()
    }


def test_outside_of_a_repository_git_writes_nothing_onto_the_screen(
    subject, folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(
        HarnessModel, "loglikelihood", lambda self, asked: [(0.0, False)] * len(asked)
    )
    results = run_tasks(HarnessModel(subject), ["choose"], include_path=folder, limit=1)
    assert results["git_hash"] is None
    assert "git" not in capfd.readouterr().err


@pytest.mark.slow
def test_both_roads_give_every_option_the_same_log_likelihood(subject, folder, samples):
    (score,) = evaluate(
        subject, load_suite(str(folder / "ours.yaml")), shots=[0], progress=Silent()
    ).scores
    assert len(samples["choose"]) == len(score.items) == len(ITEMS)
    for theirs, ours in zip(samples["choose"], score.items, strict=True):
        found = [(float(nats), greedy == "True") for ((nats, greedy),) in theirs["resps"]]
        wanted = [(option["nats"], option["greedy"]) for option in ours["options"]]
        # Both sum the same float32 numbers, which may come from batches of other shapes.
        np.testing.assert_allclose([n for n, _ in found], [n for n, _ in wanted], rtol=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        assert theirs["acc"] == ours["accuracy"]


@pytest.mark.slow
def test_both_roads_generate_the_same_text(subject, folder, samples):
    (score,) = evaluate(
        subject, load_suite(str(folder / "free.yaml")), shots=[0], progress=Silent()
    ).scores
    for theirs, ours in zip(samples["say"], score.items, strict=True):
        assert theirs["resps"][0][0].strip() == ours["generated"]


class Request:
    def __init__(self, *args):
        self.args, self.task_name, self.doc_id = args, "task", 0


def test_a_long_text_is_scored_window_by_window_every_token_once(subject):
    encoder, text = subject.tokenizer, "The river and the stone. " * 25
    windows = _rolling(encoder, text, 256)
    ids = [encoder.bos_id, *encoder.encode(text)]
    assert [token for each in windows for token in each.ids[-each.num_scored :]] == ids[1:]
    assert windows[0].ids[0] == encoder.bos_id
    assert all(each.num_inputs == 256 for each in windows)
    (nats,) = HarnessModel(subject).loglikelihood_rolling([Request(text)])
    found = Likelihoods.of(subject).score([[each] for each in windows])
    assert nats == pytest.approx(sum(each.total for (each,) in found), rel=1e-6)


def test_a_drawn_text_stops_where_the_task_says(subject):
    options = {"temperature": 1.0, "do_sample": True, "max_gen_toks": 40}
    model = HarnessModel(subject)
    (text,) = model.generate_until([Request("The", options)])
    middle = text[len(text) // 2]
    (shorter,) = model.generate_until([Request("The", {**options, "until": [middle]})])
    assert shorter == text[: text.index(middle)]


def test_what_cannot_be_scored_is_one_clear_error(subject, folder, tmp_path):
    with pytest.raises(DataError, match="longer than the window of 256 tokens"):
        HarnessModel(subject).loglikelihood([Request("a", "b" * 300)])
    with pytest.raises(RecipeError, match="no folder"):
        run_tasks(HarnessModel(subject), ["choose"], include_path=tmp_path / "gone")
    (folder / "gone.yaml").write_text(
        THEIRS.format(
            name="gone", path="gone.jsonl", kind="multiple_choice", target="label", more=CHOICES
        )
    )
    with pytest.raises(DataError, match="lm-eval could not run gone: FileNotFoundError"):
        run_tasks(HarnessModel(subject), ["gone"], include_path=folder)
