"""`glam plan`: what it prints, and how it ends. Nothing here needs the TPU compiler."""

import dataclasses
import json

import pytest

from glamcli.config.chips import load_chips
from glamcli.errors import PlanError
from glamcli.plan import planner
from glamcli.plan.topology import parse_target

GPUS = parse_target("8xh100", load_chips())

MESH = ("--set", "mesh.expert=2", "--set", "mesh.model=2")


def test_a_plan_for_gpus_in_words_in_json_and_as_a_page(glam, tmp_path):
    page = tmp_path / "plan.html"
    code, out, _ = glam("plan", "quickstart", "--target", "8xh100", *MESH, "--html", page)
    assert code == 0
    assert out.splitlines()[0] == "quickstart on 8 H100 GPUs: fits"
    assert "by formula, coarse" in out
    assert "mesh: data 2 x expert 2 x model 2" in out
    for line in ("a chip has", "FLOPs, useful", "the whole run (estimate)", "456 MWh for 600B"):
        assert line in out, line
    text = page.read_text()
    assert "<script" not in text
    assert "http" not in text, "nothing is fetched"
    assert text.count("<i></i>") == 8, "a square for every GPU"
    assert "repeat(2,28px)" in text, "large enough to see"
    assert "<h1>quickstart <b>fits</b> 8 H100 GPUs</h1>" in text
    assert ", 64/expert, " in text, "experts are split over the mesh axis of that name"
    assert "one of 2 shards of <code>expert</code>" in text
    assert "one of 2 shards of `expert`" in out
    code, out, _ = glam("plan", "quickstart", "--target", "8xh100", *MESH, "--json", "--price", 2)
    plan = json.loads(out.splitlines()[-1])
    assert plan["cost"]["dollars"] == pytest.approx(2 * plan["cost"]["chip_hours"])
    assert plan["mesh"] == {"slice": 1, "stage": 1, "data": 2, "expert": 2, "model": 2}


def test_an_unknown_target_is_one_line_and_ends_with_5(glam):
    code, out, err = glam("plan", "test-tiny", "--target", "v4_8")
    assert (code, out) == (5, "")
    assert err == "error: unknown target `v4_8`\nhint: did you mean `v4-8`?\n"


def test_the_recipes_own_target_is_the_default(glam, monkeypatch):
    asked = []

    def parse(name, chips):
        del chips
        asked.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr("glamcli.plan.topology.parse_target", parse)
    assert glam("plan", "glam_64b_64e")[0] == 130
    glam("plan", "test-tiny")
    assert asked == ["v4-2048", "local"]


def test_options_that_contradict_each_other_are_refused(glam):
    assert glam("plan", "test-tiny", "--search", "--all-targets")[0] == 2
    assert glam("plan", "test-tiny", "--search", "--html", "x.html")[0] == 2
    code, _, err = glam("plan", "test-tiny", "--tune", "--search")
    assert (code, err.splitlines()[0]) == (2, "error: `--search` and `--tune` exclude each other")
    code, _, err = glam("plan", "test-tiny", "--target", "cpu:8", "--search")
    assert code == 5
    assert "a search needs a target whose speed is known" in err


def test_all_targets_of_one_kind_end_in_a_line_per_kind(glam, monkeypatch):
    def make_plan(recipe, target, prices):
        raise PlanError("the step needs 41.2 GiB per chip")

    monkeypatch.setattr("glamcli.plan.search.make_plan", make_plan)
    monkeypatch.setattr("glamcli.plan.search.slice_sizes", lambda chip: [4])
    code, out, _ = glam("plan", "test-tiny", "--all-targets", "--target", "v5e", "--json")
    assert code == 0
    *_, refused = [row for row in map(json.loads, out.splitlines()) if row["event"] == "refused"]
    assert refused["chip"] == "v5e"
    assert refused["why"] == "v5e-4: the step needs 41.2 GiB per chip"
    code, out, err = glam("plan", "test-tiny", "--all-targets", "--target", "v5e-4")
    assert (code, out) == (5, "")
    assert "`v5e-4` is not one" in err


def test_a_recipe_that_does_not_divide_is_one_line(glam):
    code, _, err = glam("plan", "test-tiny", "--target", "8xh100", "--set", "batch.rows=12")
    assert code == 2
    assert "error: --set: `batch.rows` is 12, which does not divide over 8 data shards" in err


@pytest.mark.parametrize("interrupted", [False, True])
def test_tuning_ends_in_a_table_and_lines_to_paste_even_when_interrupted(
    glam, monkeypatch, interrupted
):
    # Nothing is compiled: the times are those of a plan by formula, with less waiting by flags.
    real, calls = planner.make_plan, []

    def make_plan(recipe, target, prices):
        del target
        calls.append(recipe.runtime.xla_flags)
        if interrupted and len(calls) == 3:
            raise KeyboardInterrupt
        plan = real(recipe, GPUS, prices)
        waiting = 2.0 - len(recipe.runtime.xla_flags)
        time = dataclasses.replace(plan.time, compute=8.0, exposed={"data": waiting})
        sent = [(kind, ("data",), 1, 1) for kind in ("all-gather", "all-to-all")]
        return dataclasses.replace(plan, time=time, collectives=sent)

    monkeypatch.setattr("glamcli.plan.tune.make_plan", make_plan)
    code, out, err = glam("plan", "quickstart", "--target", "v4-16", "--tune")
    assert code == (130 if interrupted else 0)
    rows = [line.split() for line in out.splitlines()]
    assert ["as", "in", "the", "recipe", "10.000", "s", "2.000", "s", "0", "%"] in [
        row[:10] for row in rows
    ]
    gather = ["xla_enable_async_all_gather=true", "9.000", "s", "1.000", "s", "50", "%"]
    assert gather in [row[:7] for row in rows]
    pasted = out.partition("for the recipe:\n\n")[2].splitlines()
    assert pasted[0] == "runtime:"
    assert pasted[1].startswith("  xla_flags: # glam plan --tune for v4-16, ")
    assert pasted[2].startswith("    xla_enable_async_all_gather: true # weights")
    assert ("together" in err) is not interrupted
    calls.clear()
    code, out, _ = glam("plan", "quickstart", "--target", "v4-16", "--tune", "--json")
    events = [row for row in map(json.loads, out.splitlines()) if row["event"] in ("tried", "tune")]
    first, *_, last = events
    assert (first["event"], first["xla_flags"], last["event"]) == ("tried", {}, "tune")
    assert "xla_enable_async_all_gather" in last["best"]
