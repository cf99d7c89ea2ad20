"""Tasks scored during training: what an interruption leaves is what would have been without it."""

import signal

import pytest

from board import curves
from runs import assert_same_run, metrics

TASK = 'data: {path: sums.jsonl}\nprompt: "{a} and {b} make"\noptions: o\nlabel: right\n'
ITEM = '{"a": %d, "b": %d, "o": ["odd", "even"], "right": %d}\n'


@pytest.mark.slow
def test_a_run_interrupted_between_evaluations_scores_as_if_it_had_not_been(train, tmp_path):
    (tmp_path / "sums.yaml").write_text(TASK)
    items = [ITEM % (i, 3 * i + 1, i % 2) for i in range(9)]
    (tmp_path / "sums.jsonl").write_text("".join(items))
    settings = ("every.eval_steps=10", "eval.limit=8", f"eval.suite={tmp_path}/sums.yaml")
    sets = [part for each in settings for part in ("--set", each)]
    code, err = train(tmp_path / "whole", *sets).finish()
    assert code == 0, err
    cut = train(tmp_path / "cut", *sets)
    cut.until_step(21)
    cut.process.send_signal(signal.SIGTERM)
    assert cut.finish()[0] == 75
    assert train(tmp_path / "cut", *sets).finish()[0] == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "cut") if "eval/failed_tasks" in line]
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    name = "eval/sums/accuracy/0_shots"
    assert all(0 <= line[name] <= 1 for line in lines)
    drawn = curves(tmp_path / "cut" / "tensorboard")
    assert {step: value for (step, tag), value in drawn.items() if tag == name} == {
        line["step"]: line[name] for line in lines
    }
