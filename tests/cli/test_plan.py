"""`glam plan`: what it prints, and how it ends. Nothing here needs the TPU compiler."""

import json

import pytest

from glamcli.errors import PlanError

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
