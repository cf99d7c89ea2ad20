"""Means of a step's sums, router alarms, and metric files that survive what happens to them."""

import json
import math
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from board import events_in
from glamcli.config.schema import Batch, Data, Model, Moe, Recipe, Train
from glamcli.progress import Silent
from glamcli.train.metrics import MetricsFile, TensorBoard, add_losses, alarms, summarise

MOE = Moe(num_experts=4)
RECIPE = Recipe(
    model=Model(num_layers=4, model_dim=8, ffn_dim=8, num_heads=1, head_dim=8, vocab_size=64),
    moe=MOE,
    batch=Batch(rows=4, row_tokens=10),
    train=Train(steps=5),
    data=Data(mixture="quickstart"),
)
SUMS = {
    "step": 7,
    "loss_nats": 64.0,
    "z_sum": 10.0,
    "num_targets": 32,
    "source_nats": [60.0, 4.0, 0.0],
    "source_targets": [30, 2, 0],
    "loss": 2.1,
    "learning_rate": 0.01,
    "grad_norm": float("inf"),
    "param_norm": 3.0,
    "finite": False,
    "bad_steps": 1,
    "bad_steps_total": 2,
    "routing": {
        "balance_loss": [1.0, 1.5],
        "router_z_loss": [4.0, 1.0],
        "wanted_E": [[0.25] * 4, [0.7, 0.3, 0.0, 0.0]],
        "load_E": [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]],
        "first_E": [[0.25] * 4, [0.9, 0.1, 0.0, 0.0]],
        "dropped_first_frac": [0.0, 0.5],
        "dropped_second_frac": [0.1, 0.3],
        "dropped_frac": [0.05, 0.4],
        "served_3": [[0.0, 0.1, 0.9], [0.2, 0.4, 0.4]],
        "router_entropy_nats": [1.2, 0.4],
        "dead_experts": [0.0, 2.0],
    },
}


class Warned(Silent):
    def __init__(self):
        self.texts = []

    def warn(self, text):
        self.texts.append(text)


def summary(sums, names="abc", before=None):
    return summarise(sums, add_losses(before or {}, sums, names), RECIPE)


def routing(**changes):
    return summary({**SUMS, "routing": {**SUMS["routing"], **changes}})


def test_means_are_over_real_targets_of_all_and_of_each_source():
    got = summary(SUMS, ["web", "books", "news"])
    assert (got["step"], got["loss"], got["perplexity"]) == (7, 2.0, math.exp(2.0))
    assert (got["loss/web"], got["loss/books"], got["loss/news"]) == (2.0, 2.0, None)
    assert got["softmax_z"] == 10.0 / 32
    assert got["padding_frac"] == pytest.approx(0.2)
    assert got["grad_norm"] is None
    assert (got["bad_steps"], got["bad_steps_total"]) == (1, 2)


def test_losses_are_means_over_the_targets_of_several_steps():
    before = {"": (36.0, 8), "web": (36.0, 8), "gone": (1.0, 1)}
    got = summary(SUMS, ["web", "books", "news"], before)
    assert got["loss"] == 100.0 / 40
    assert got["perplexity"] == math.exp(2.5)
    assert (got["loss/web"], got["loss/books"], got["loss/news"]) == (96.0 / 38, 2.0, None)
    assert "loss/gone" not in got


def test_router_numbers_are_told_by_layer_and_as_means():
    got = summary(SUMS)
    assert (got["balance"], got["balance_by_layer"]) == (1.25, [1.0, 1.5])
    assert got["dropped_frac"] == pytest.approx(0.225)
    assert (got["dead_experts"], got["dead_experts_by_layer"]) == (2, [0, 2])
    assert got["max_first_frac_by_layer"] == [0.25, 0.9]
    assert (got["router_z"], got["router_z_by_layer"]) == (2.5, [4.0, 1.0])
    assert got["unserved_frac"] == pytest.approx(0.1)
    assert got["served_one_frac"] == pytest.approx(0.25)
    assert got["served_one_frac_by_layer"] == [0.1, 0.4]
    assert got["served_two_frac"] == pytest.approx(0.65)
    assert got["served_two_frac_by_layer"] == [0.9, 0.4]
    assert got["load_by_layer"] == [[0.25] * 4, [0.7, 0.3, 0.0, 0.0]]  # before capacity evens it


def test_a_dense_model_has_no_router_numbers():
    got = summary({**SUMS, "routing": {}})
    assert not any("balance" in name or "dropped" in name for name in got)


def test_alarms_name_the_layer_and_the_knob():
    collapse, dropped = alarms(summary(SUMS), MOE)
    assert collapse == (
        "expert layer 2: 90% of tokens choose the same expert of 4 first; "
        "raise `moe.balance_coef` (now 0.01)"
    )
    assert dropped == (
        "expert layer 2: 40% of choices are dropped; raise `moe.capacity_factor` (now 2) "
        "or `moe.balance_coef` (now 0.01)"
    )
    dead = routing(
        wanted_E=[[0.25] * 4, [1.0, 0.0, 0.0, 0.0]], first_E=[[0.25] * 4] * 2, dropped_frac=[0, 0]
    )
    assert alarms(dead, MOE) == [
        "expert layer 2: 3 of 4 experts get no token; raise `moe.balance_coef` (now 0.01)"
    ]


def test_a_balanced_router_raises_no_alarm():
    calm = routing(wanted_E=[[0.25] * 4] * 2, first_E=[[0.25] * 4] * 2, dropped_frac=[0.1, 0.1])
    assert alarms(calm, MOE) == []


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_line_is_one_object_and_not_finite_is_null(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0, Silent())
    file.write(summary(SUMS))
    file.write({"step": 8, "loss": float("nan"), "loss_by_layer": [1.0, float("inf")]})
    file.close()
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == summary(SUMS)
    assert second == {"step": 8, "loss": None, "loss_by_layer": [1.0, None]}


def test_resuming_drops_later_steps_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, Silent())
    for step in range(1, 8):
        file.write({"step": step})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 8, "lo')
    again = MetricsFile(path, 5, Silent())
    again.write({"step": 6})
    again.close()
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


@contextmanager
def files_no_larger_than(size):
    """What a full disk does to a write: part of it is written, then none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_whole_lines_and_one_warning(tmp_path):
    path, progress = tmp_path / "metrics.jsonl", Warned()
    file = MetricsFile(path, 0, progress)
    file.write({"step": 1})
    with files_no_larger_than(path.stat().st_size + 5):
        file.write({"step": 2})
        file.write({"step": 3})
    file.write({"step": 4})
    file.close()
    assert steps_in(path) == [1, 4]
    assert len(progress.texts) == 1
    assert progress.texts[0].startswith(f"{path} cannot be written")


def test_a_metrics_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "run").write_text("a file in the way")
    progress = Warned()
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl", 0, progress)
    file.write({"step": 1})
    file.close()
    board = TensorBoard(tmp_path / "run" / "tensorboard", 0, progress)
    board.write({"step": 1, "loss": 2.0})
    board.close()
    assert len(progress.texts) == 2


def test_tensorboard_gets_a_curve_per_number_and_layer(tmp_path):
    board = TensorBoard(tmp_path, 6, Silent())
    board.write(
        {
            "step": 7,
            "loss": 2.5,
            "balance_by_layer": [1.0, None],
            "load_by_layer": [[0.5, 0.5], [0.1, 0.9]],  # a curve per expert would be too many
            "note": "text",
        }
    )
    board.close()
    version, restart, event = events_in(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert restart.step == 7  # what an earlier process wrote from here on is forgotten
    assert event.step == 7
    curves = {value.tag: value.simple_value for value in event.summary.value}
    assert curves == {"loss": 2.5, "balance_by_layer/1": 1.0}


def test_tensorboard_on_a_full_disk_ends_with_one_warning(tmp_path):
    progress = Warned()
    board = TensorBoard(tmp_path, 0, progress)
    with files_no_larger_than(100):
        for step in range(1, 30):
            board.write({"step": step, **{f"value/{i}": np.pi for i in range(20)}})
            board.flush()
    board.close()
    assert len(progress.texts) == 1
