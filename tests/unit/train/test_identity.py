"""What may differ between a checkpoint and the run that continues it."""

import copy

import pytest

from glamcli.config.load import load_recipe
from glamcli.train.identity import differences, other_bits, recipe_differences, recipe_hash

RECIPE = load_recipe("test-tiny").recipe


def known(*sets):
    """An identity as `at_step` builds it, of a run with these settings."""
    return {
        "recipe": load_recipe("test-tiny", sets).recipe.model_dump(mode="json"),
        "data": {
            "tokenizer": "aa",
            "sources": {"web": "11", "books": "22"},
            "history": {
                "seed": 0,
                "stages": [[0, {"web": 0.7, "books": 0.3}]],
                "num_rows": {"web": 100, "books": 50},
            },
        },
        "versions": {"jax": "0.10.2"},
        "topology": {"threads": 2},
    }


@pytest.mark.parametrize(
    "setting",
    [
        "train.steps=40",
        "train.max_bad_steps=3",
        "every.log_steps=7",
        "every.heldout_steps=null",
        "checkpoints.keep=9",
        "heldout.rows=8",
        "finish.prompt=Hello",
        "runtime.huge_pages=off",
        "mesh.expert=2",
        "data.prepare_processes=0",
        "about=other words",
    ],
)
def test_settings_beside_the_arithmetic_may_change(setting):
    assert differences(known(), known(setting)) == []


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed=1", "`seed` was 0, is 1"),
        ("model.num_layers=4", "`model.num_layers` was 2, is 4"),
        ("moe.capacity_factor=1.25", "`moe.capacity_factor` was 2.0, is 1.25"),
        ("optimizer.learning_rate=0.1", "`optimizer.learning_rate` was 0.01, is 0.1"),
        ("batch.accumulate=2", "`batch.accumulate` was 1, is 2"),
        ("loss.z_coef=0", "`loss.z_coef` was 0.0001, is 0.0"),
        ("train.remat=full", '`train.remat` was "none", is "full"'),
        ("data.packing=whole", '`data.packing` was "fill", is "whole"'),
    ],
)
def test_what_changes_the_arithmetic_is_named(setting, expected):
    assert differences(known(), known(setting)) == [expected]


def test_experts_taken_away_are_named():
    assert "`moe` was absent, is " not in str(differences(known(), known("moe=null")))
    assert "`moe.num_experts` was 4, is absent" in differences(known(), known("moe=null"))


def test_a_setting_that_came_later_had_its_default():
    old = known()
    del old["recipe"]["moe"]["router_z_coef"]
    assert recipe_differences(old, RECIPE.model_dump(mode="json")) == []


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("tokenizer", "bb", "the tokenizer is another one"),
        ("sources", {"web": "12", "books": "22"}, "source `web` holds other rows"),
    ],
)
def test_other_data_is_named(key, value, expected):
    now = known()
    now["data"][key] = value
    assert differences(known(), now) == [expected]


def test_sources_that_came_or_went_are_named():
    now = known()
    now["data"]["history"]["num_rows"] = {"web": 100, "code": 7}
    assert differences(known(), now) == [
        "source `books` had 50 rows, is not read",
        "source `code` was not read, has 7 rows",
    ]


def test_weights_of_rows_already_seen_may_not_change_and_later_ones_may():
    now = known()
    now["data"]["history"]["stages"] = [[0, {"web": 0.5, "books": 0.5}]]
    assert "weights of the rows already seen were" in differences(known(), now)[0]
    now = copy.deepcopy(known())
    now["data"]["sources"]["code"] = "33"  # joins in a later stage, so no row of it was used
    assert differences(known(), now) == []


def test_other_software_and_devices_are_told_apart_from_another_run():
    now = known()
    now["versions"]["jax"] = "0.11.0"
    now["topology"]["threads"] = 1
    assert differences(known(), now) == []
    assert other_bits(known(), now) == [
        'versions jax: "0.10.2" then, "0.11.0" now',
        "topology threads: 2 then, 1 now",
    ]


def layout(policy="random", mesh=None, **pipeline):
    """An identity on two stages, whatever the rest of the recipe thinks of them."""
    run = known()
    run["recipe"]["moe"]["second_policy"] = policy
    run["recipe"]["pipeline"] = {"microbatches": 4, "repeats": 1} | pipeline
    run["recipe"]["mesh"] |= mesh or {}
    run["topology"]["mesh"] = {"slice": 1, "stage": 2, "data": 2, "expert": 1, "model": 1}
    return run


def test_other_microbatches_draw_other_second_experts_and_that_is_said():
    changed = "`pipeline.microbatches` was 4, is 8"
    assert differences(layout(), layout(microbatches=8)) == []
    assert other_bits(layout(), layout(microbatches=8)) == [
        changed,
        "second experts are drawn differently",
    ]
    assert other_bits(layout("all"), layout("all", microbatches=8)) == [changed]
    more = layout()
    more["topology"]["mesh"]["data"] = 4
    assert other_bits(layout(), more)[1:] == ["second experts are drawn differently"]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"repeats": 2}, ["`pipeline.repeats` was 1, is 2"]),
        ({"mesh": {"residual": "whole"}}, ['`mesh.residual` was "embed", is "whole"']),
        (
            {"mesh": {"collective_matmul": "auto"}},
            ['`mesh.collective_matmul` was "off", is "auto"'],
        ),
        ({"mesh": {"data": 2}}, []),  # the devices are the same
    ],
)
def test_every_setting_that_changes_bits_alone_is_said(now, expected):
    assert other_bits(layout(), layout(**now)) == expected


def test_the_hash_depends_on_every_value():
    assert recipe_hash(RECIPE) == recipe_hash(load_recipe("test-tiny").recipe)
    assert recipe_hash(RECIPE) != recipe_hash(load_recipe("test-tiny", ["about=x"]).recipe)


def test_another_flag_of_the_compiler_is_allowed_and_said():
    flagged = layout()
    flagged["recipe"]["runtime"]["xla_flags"] = {"xla_some_flag": True}
    assert differences(layout(), flagged) == []
    assert other_bits(layout(), flagged) == [
        "`runtime.xla_flags.xla_some_flag` was absent, is true"
    ]
